"""Every error that a user can cause or meet; each message is one sentence saying what, where and what to do."""


class Error(Exception):
    """Base of all errors raised on purpose by nestc; the CLI prints it in one line and exits with status 2."""


class ModelError(Error):
    """The model file cannot be read, is not valid ONNX, or uses something that ONNX forbids."""


class UnsupportedOp(Error):
    """No given target can run an operator, in this form, of the model."""


class ShapeError(Error):
    """An input or a dimension has the wrong name, shape or dtype, or is not bound."""


class TargetError(Error):
    """A target is unknown, is misconfigured, or its device failed."""


class PlanError(Error):
    """A partitioning plan contradicts the model or the devices."""


class BundleError(Error):
    """A bundle is cut, altered, of another version, or cannot be written."""


class QuantizationError(Error):
    """A scheme, an override, a profile or calibration data does not fit the model, or a budget cannot be met."""


class DataError(Error):
    """Samples or labels cannot be read, are empty, hold NaN, or are not of the kind that the model takes."""
