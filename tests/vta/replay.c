/* A second executor of VTA streams, in C, so that a C compiler lays out the bit-fields (as tvm-vta's hw_spec.h has them).
 *
 * usage: replay MEMORY BASE OUT ORDER (ADDRESS COUNT)...
 * Reads the memory image (address BASE on), runs the streams one after the other and writes the memory to OUT.
 * ORDER: which of the three engines goes first whenever several could: a permutation of "lcs".
 * Sizes of the machine are given when compiling, by the keys of its configuration.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH (1 << LOG_BATCH)
#define BLOCK (1 << LOG_BLOCK)
#define LOG_UOP_DEPTH (LOG_UOP_BUFF_SIZE - 2)
#define LOG_INP_DEPTH (LOG_INP_BUFF_SIZE - LOG_BATCH - LOG_BLOCK)
#define LOG_WGT_DEPTH (LOG_WGT_BUFF_SIZE - 2 * LOG_BLOCK)
#define LOG_ACC_DEPTH (LOG_ACC_BUFF_SIZE - LOG_BATCH - LOG_BLOCK - 2)

#define HEAD uint64_t opcode : 3; uint64_t pop_prev : 1; uint64_t pop_next : 1; uint64_t push_prev : 1; uint64_t push_next : 1;
#define LOOPS uint64_t reset : 1; uint64_t begin : LOG_UOP_DEPTH; uint64_t end : LOG_UOP_DEPTH + 1; \
  uint64_t iter_out : 14; uint64_t iter_in : 14; uint64_t dst_out : LOG_ACC_DEPTH; uint64_t dst_in : LOG_ACC_DEPTH;

typedef struct {
  HEAD uint64_t memory : 3; uint64_t sram : 16; uint64_t dram : 32;
  uint64_t y_size : 16; uint64_t x_size : 16; uint64_t x_stride : 16;
  uint64_t y_pad_0 : 4; uint64_t y_pad_1 : 4; uint64_t x_pad_0 : 4; uint64_t x_pad_1 : 4;
} Mem;
typedef struct {
  HEAD LOOPS uint64_t src_out : LOG_INP_DEPTH; uint64_t src_in : LOG_INP_DEPTH;
  uint64_t wgt_out : LOG_WGT_DEPTH; uint64_t wgt_in : LOG_WGT_DEPTH;
} Gemm;
typedef struct {
  HEAD LOOPS uint64_t src_out : LOG_ACC_DEPTH; uint64_t src_in : LOG_ACC_DEPTH;
  uint64_t op : 3; uint64_t use_imm : 1; int64_t imm : 16;
} Alu;
typedef union { Mem mem; Gemm gemm; Alu alu; uint64_t words[2]; } Insn;
typedef struct { uint32_t dst : LOG_ACC_DEPTH; uint32_t src : LOG_ACC_DEPTH; uint32_t wgt : LOG_WGT_DEPTH; } Uop;

_Static_assert(sizeof(Insn) == 16 && sizeof(Mem) == 16 && sizeof(Gemm) == 16 && sizeof(Alu) == 16, "128 bits");
_Static_assert(sizeof(Uop) == 4, "32 bits");

enum { LOAD, STORE, GEMM, FINISH, ALU };
enum { UOP, WGT, INP, ACC, OUT };

static Uop uops[1 << LOG_UOP_DEPTH];
static int8_t inp[1 << LOG_INP_DEPTH][BATCH][BLOCK];
static int8_t wgt[1 << LOG_WGT_DEPTH][BLOCK][BLOCK];
static int32_t acc[1 << LOG_ACC_DEPTH][BATCH * BLOCK];
static uint8_t *dram;
static uint64_t dram_end;

static void fail(const char *what, long at) { fprintf(stderr, "instruction %ld: %s\n", at, what); exit(1); }

static void load(const Mem *m, long at) {
  const struct { uint8_t *data; uint64_t size, depth; } memories[] = {
    {(uint8_t *)uops, sizeof(Uop), 1 << LOG_UOP_DEPTH},
    {(uint8_t *)wgt, sizeof wgt[0], 1 << LOG_WGT_DEPTH},
    {(uint8_t *)inp, sizeof inp[0], 1 << LOG_INP_DEPTH},
    {(uint8_t *)acc, sizeof acc[0], 1 << LOG_ACC_DEPTH},
  };
  if (m->memory > ACC) fail("a load of an unknown memory", at);
  uint64_t size = memories[m->memory].size, across = m->x_pad_0 + m->x_size + m->x_pad_1;
  uint64_t rows = m->y_pad_0 + m->y_size + m->y_pad_1;
  if (m->sram + across * rows > memories[m->memory].depth) fail("a load beyond its memory", at);
  uint8_t *to = memories[m->memory].data + m->sram * size;
  memset(to, 0, across * rows * size);
  for (uint64_t y = 0; y < m->y_size; y++) {
    uint64_t from = (m->dram + y * m->x_stride) * size;
    if (from + m->x_size * size > dram_end) fail("a load beyond DRAM", at);
    memcpy(to + ((m->y_pad_0 + y) * across + m->x_pad_0) * size, dram + from, m->x_size * size);
  }
}

static void store(const Mem *m, long at) {
  if (m->memory != OUT || m->y_pad_0 || m->y_pad_1 || m->x_pad_0 || m->x_pad_1) fail("not a store of outputs", at);
  if (m->sram + m->x_size * m->y_size > (1 << LOG_ACC_DEPTH)) fail("a store from beyond its memory", at);
  for (uint64_t y = 0; y < m->y_size; y++)
    for (uint64_t x = 0; x < m->x_size; x++) {
      uint64_t to = (m->dram + y * m->x_stride + x) * BATCH * BLOCK;
      if (to + BATCH * BLOCK > dram_end) fail("a store beyond DRAM", at);
      for (int lane = 0; lane < BATCH * BLOCK; lane++) dram[to + lane] = (uint8_t)acc[m->sram + y * m->x_size + x][lane];
    }
}

static void gemm(const Gemm *g, long at) {
  for (uint64_t i = 0; i < g->iter_out; i++)
    for (uint64_t j = 0; j < g->iter_in; j++)
      for (uint64_t u = g->begin; u < g->end; u++) {
        uint64_t d = uops[u].dst + i * g->dst_out + j * g->dst_in, s = uops[u].src + i * g->src_out + j * g->src_in;
        uint64_t w = uops[u].wgt + i * g->wgt_out + j * g->wgt_in;
        if (d >= 1 << LOG_ACC_DEPTH || (!g->reset && (s >= 1 << LOG_INP_DEPTH || w >= 1 << LOG_WGT_DEPTH)))
          fail("an index beyond its memory", at);
        if (g->reset) { memset(acc[d], 0, sizeof acc[d]); continue; }
        for (int b = 0; b < BATCH; b++)
          for (int o = 0; o < BLOCK; o++) {
            uint32_t sum = (uint32_t)acc[d][b * BLOCK + o];
            for (int k = 0; k < BLOCK; k++) sum += (uint32_t)(inp[s][b][k] * wgt[w][o][k]);
            acc[d][b * BLOCK + o] = (int32_t)sum;
          }
      }
}

static int32_t apply(int op, int32_t x, int32_t y, long at) {
  switch (op) {
    case 0: return x < y ? x : y;
    case 1: return x > y ? x : y;
    case 2: return (int32_t)((uint32_t)x + (uint32_t)y);
    case 3: return y >= 0 ? x >> y : (int32_t)((uint32_t)x << -y);
  }
  fail("an operation that not every VTA has", at);
  return 0;
}

static void alu(const Alu *a, long at) {
  for (uint64_t i = 0; i < a->iter_out; i++)
    for (uint64_t j = 0; j < a->iter_in; j++)
      for (uint64_t u = a->begin; u < a->end; u++) {
        uint64_t d = uops[u].dst + i * a->dst_out + j * a->dst_in, s = uops[u].src + i * a->src_out + j * a->src_in;
        if (d >= 1 << LOG_ACC_DEPTH || (!a->use_imm && s >= 1 << LOG_ACC_DEPTH)) fail("an index beyond its memory", at);
        for (int lane = 0; lane < BATCH * BLOCK; lane++)
          acc[d][lane] = apply(a->op, acc[d][lane], a->use_imm ? (int32_t)a->imm : acc[s][lane], at);
      }
}

static int engine(const Insn *n) {
  if (n->mem.opcode == STORE) return 2;
  return n->mem.opcode == LOAD && (n->mem.memory == INP || n->mem.memory == WGT) ? 0 : 1;
}

/* Each engine takes its own instructions in order; tokens between neighbours are the only other order there is. */
static void run(const Insn *code, long count, const char *order) {
  long at[3] = {0, 0, 0}, tokens[3][3] = {{0}}, done = 0, finished = 0; /* tokens[from][to] */
  while (done < count) {
    int moved = 0;
    for (const char *c = order; *c && !moved; c++) {
      int e = *c == 'l' ? 0 : *c == 'c' ? 1 : 2;
      while (at[e] < count && engine(&code[at[e]]) != e) at[e]++;
      if (at[e] == count) continue;
      const Insn *n = &code[at[e]];
      if ((n->mem.pop_prev && (e == 0 || !tokens[e - 1][e])) || (n->mem.pop_next && (e == 2 || !tokens[e + 1][e]))) continue;
      if (n->mem.pop_prev) tokens[e - 1][e]--;
      if (n->mem.pop_next) tokens[e + 1][e]--;
      switch (n->mem.opcode) {
        case LOAD: if (n->mem.x_size) load(&n->mem, at[e]); break;
        case STORE: if (n->mem.x_size) store(&n->mem, at[e]); break;
        case GEMM: gemm(&n->gemm, at[e]); break;
        case ALU: alu(&n->alu, at[e]); break;
        case FINISH: finished++; break;
        default: fail("an unknown opcode", at[e]);
      }
      if (n->mem.push_prev) { if (e == 0) fail("a token for nobody", at[e]); tokens[e][e - 1]++; }
      if (n->mem.push_next) { if (e == 2) fail("a token for nobody", at[e]); tokens[e][e + 1]++; }
      at[e]++, done++, moved = 1;
    }
    if (!moved) fail("deadlock", at[1]);
  }
  if (finished != 1) fail("not one FINISH", count);
}

int main(int argc, char **argv) {
  if (argc < 5 || argc % 2 == 0) return 2;
  FILE *file = fopen(argv[1], "rb");
  uint64_t base = strtoull(argv[2], NULL, 0);
  if (!file || fseek(file, 0, SEEK_END)) return 2;
  dram_end = base + (uint64_t)ftell(file);
  rewind(file);
  dram = calloc(dram_end, 1);
  if (!dram || fread(dram + base, 1, dram_end - base, file) != dram_end - base) return 2;
  fclose(file);
  for (int k = 5; k + 1 < argc; k += 2) {
    long count = atol(argv[k + 1]);
    Insn *code = malloc(count * sizeof(Insn));
    memcpy(code, dram + strtoull(argv[k], NULL, 0), count * sizeof(Insn));
    run(code, count, argv[4]);
    free(code);
  }
  file = fopen(argv[3], "wb");
  return !file || fwrite(dram, 1, dram_end, file) != dram_end || fclose(file);
}
