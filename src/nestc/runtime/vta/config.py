"""A VTA machine as data: the logarithms that its own configuration files hold, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VtaConfig:
    """Parameters of one VTA (tvm-vta ``config/vta_config.json``); sizes are log2, of bits (WIDTH) or bytes (BUFF_SIZE).

    An element of a memory is what one address stands for: ``inp`` (batch, block) int8, ``wgt`` (block, block) int8
    [out, in], ``acc`` (batch, block) int32, ``out`` (batch, block) int8, ``uop`` 32 bits.
    """

    name: str = "pynq_1x16x16"
    log_inp_width: int = 3
    log_wgt_width: int = 3
    log_acc_width: int = 5
    log_batch: int = 0
    log_block: int = 4
    log_uop_buff_size: int = 15
    log_inp_buff_size: int = 15
    log_wgt_buff_size: int = 18
    log_acc_buff_size: int = 17
    clock_hz: float = 100e6
    bus_bits: int = 64

    @property
    def batch(self) -> int:
        """Rows of an input element."""
        return 1 << self.log_batch

    @property
    def block(self) -> int:
        """Channels of an element, in and out."""
        return 1 << self.log_block

    @property
    def log_uop_depth(self) -> int:
        """log2 of the micro-ops that the buffer holds."""
        return self.log_uop_buff_size - 2

    @property
    def log_inp_depth(self) -> int:
        """log2 of the elements of the input buffer."""
        return self.log_inp_buff_size - self.log_batch - self.log_block - self.log_inp_width + 3

    @property
    def log_wgt_depth(self) -> int:
        """log2 of the elements of the weight buffer."""
        return self.log_wgt_buff_size - 2 * self.log_block - self.log_wgt_width + 3

    @property
    def log_acc_depth(self) -> int:
        """log2 of the elements of the accumulator buffer."""
        return self.log_acc_buff_size - self.log_batch - self.log_block - self.log_acc_width + 3

    @property
    def uop_depth(self) -> int:
        """Micro-ops that the buffer holds."""
        return 1 << self.log_uop_depth

    @property
    def inp_depth(self) -> int:
        """Elements of the input buffer."""
        return 1 << self.log_inp_depth

    @property
    def wgt_depth(self) -> int:
        """Elements of the weight buffer."""
        return 1 << self.log_wgt_depth

    @property
    def acc_depth(self) -> int:
        """Elements of the accumulator buffer."""
        return 1 << self.log_acc_depth

    @property
    def inp_bytes(self) -> int:
        """Bytes of an input element, and of an output element."""
        return self.batch * self.block * (1 << self.log_inp_width) // 8

    @property
    def wgt_bytes(self) -> int:
        """Bytes of a weight element."""
        return self.block * self.block * (1 << self.log_wgt_width) // 8

    @property
    def acc_bytes(self) -> int:
        """Bytes of an accumulator element."""
        return self.batch * self.block * (1 << self.log_acc_width) // 8
