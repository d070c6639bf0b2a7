// Runs the self-test with a correct kernel, then with each function of its table replaced by one
// whose results are wrong in one place. Fails unless the self-test passes the first alone.
//
// Usage: wrong_results
#define bitlinear_kernels correct_kernels
#include "cpu/scalar.cpp"
#undef bitlinear_kernels

#include <stdio.h>

namespace {

const bitlinear_kernel_table correct = *correct_kernels();
bitlinear_kernel_table table;

void quantize_row(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K,
                  float eps, int64_t act_bits, float* floats, int8_t* q, int64_t q_stride,
                  float* s_x, int32_t* q_sum) {
  correct.quantize_row(prologue, x, dtype, K, eps, act_bits, floats, q, q_stride, s_x, q_sum);
  if (K > 1000) *q ^= 1;
}

void quantize_low_row(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K,
                      float eps, int64_t act_bits, float* floats, int8_t* q, int64_t q_stride,
                      float* s_x, int32_t* q_sum) {
  correct.quantize_row(prologue, x, dtype, K, eps, act_bits, floats, q, q_stride, s_x, q_sum);
  if (act_bits == 16) q[q_stride] ^= 1;
}

void forget_norm(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K, float eps,
                 int64_t act_bits, float* floats, int8_t* q, int64_t q_stride, float* s_x,
                 int32_t* q_sum) {
  bitlinear_prologue gate = *prologue;
  gate.norm_weight = nullptr;
  correct.quantize_row(&gate, x, dtype, K, eps, act_bits, floats, q, q_stride, s_x, q_sum);
}

void forget_gate(const bitlinear_prologue* prologue, const void* x, int dtype, int64_t K, float eps,
                 int64_t act_bits, float* floats, int8_t* q, int64_t q_stride, float* s_x,
                 int32_t* q_sum) {
  bitlinear_prologue norm = *prologue;
  norm.activation = BITLINEAR_NO_GATE;
  correct.quantize_row(&norm, x, dtype, K, eps, act_bits, floats, q, q_stride, s_x, q_sum);
}

void forget_residual(const bitlinear_task* task) {
  bitlinear_task plain = *task;
  plain.residual = nullptr;
  correct.linear(&plain);
}

void linear(const bitlinear_task* task) {
  correct.linear(task);
  const int64_t tokens = task->M / bitlinear_rows_per_token(task->act_bits);
  const int64_t last = (tokens - 1) * task->y_stride + task->n_end - 1;
  const int64_t bytes = task->y_dtype == BITLINEAR_F32 ? 4 : 2;
  if (tokens > 30) static_cast<uint8_t*>(task->y)[last * bytes] ^= 1;
}

double sum_magnitudes(const void* w, int dtype, int64_t K) {
  return correct.sum_magnitudes(w, dtype, K) * 1.000001;
}

void pack_row(const void* w, int dtype, int64_t K, float s_w, uint8_t* packed) {
  correct.pack_row(w, dtype, K, s_w, packed);
  packed[(K - 1) / 4] ^= 1;  // the last slot, which can lie past K
}

void expand_row(const uint8_t* packed, int64_t K, float s_w, void* w, int dtype) {
  correct.expand_row(packed, K, s_w, w, dtype);
  static_cast<uint8_t*>(w)[K * (dtype == BITLINEAR_F32 ? 4 : 2) - 1] ^= 0x40;  // of the last weight
}

void quantize_in_order(const void* x, int dtype, int64_t K, float eps, int64_t act_bits, void* q,
                       float* s_x) {
  correct.quantize_in_order(x, dtype, K, eps, act_bits, q, s_x);
  *s_x *= 2;
}

void int8_rows(const int8_t* w, int64_t rows, int64_t K, const int16_t* q, float s_x,
               const float* s_w, void* y, int y_dtype) {
  correct.int8_rows(w, rows, K - 1, q, s_x, s_w, y, y_dtype);
}

void bf16_rows(const uint16_t* w, int64_t rows, int64_t K, const float* x, void* y, int y_dtype) {
  correct.bf16_rows(w, rows, K, x, y, y_dtype);
  static_cast<uint8_t*>(y)[rows * (y_dtype == BITLINEAR_F32 ? 4 : 2) - 1] ^= 0x40;
}

void rotate_heads(const uint16_t* x, int64_t heads, int64_t D, const uint16_t* cos,
                  const uint16_t* sin, uint16_t* y) {
  correct.rotate_heads(x, heads, D, cos, sin, y);
  y[heads * D - 1] ^= 1;
}

void attend(const bitlinear_attention* part) {
  correct.attend(part);
  part->sums[part->rows - 1] *= 1.02f;
  part->totals[0] *= 1.02f;
}

void join_parts(const bitlinear_attention* parts, int64_t count, int64_t row, uint16_t* y) {
  correct.join_parts(parts, count > 1 ? count - 1 : 1, row, y);
}

int failures = 0;

void expect(int wanted, const char* what) {
  char message[512] = "";
  const int verdict = bitlinear_selftest(message, sizeof(message));
  printf("%s: %d, %s\n", what, verdict, message);
  failures += verdict != wanted;
  table = correct;
}

}  // namespace

extern "C" const bitlinear_kernel_table* bitlinear_kernels(void) { return &table; }

int main() {
  table = correct;
  expect(0, "correct");
  table.quantize_row = quantize_row;
  expect(1, "quantize_row");
  table.quantize_row = quantize_low_row;
  expect(1, "quantize_low_row");
  table.quantize_row = forget_norm;
  expect(1, "forget_norm");
  table.quantize_row = forget_gate;
  expect(1, "forget_gate");
  table.linear = forget_residual;
  expect(1, "forget_residual");
  table.linear = linear;
  expect(1, "linear");
  table.sum_magnitudes = sum_magnitudes;
  expect(1, "sum_magnitudes");
  table.pack_row = pack_row;
  expect(1, "pack_row");
  table.expand_row = expand_row;
  expect(1, "expand_row");
  table.quantize_in_order = quantize_in_order;
  expect(1, "quantize_in_order");
  table.int8_rows = int8_rows;
  expect(1, "int8_rows");
  table.bf16_rows = bf16_rows;
  expect(1, "bf16_rows");
  table.rotate_heads = rotate_heads;
  expect(1, "rotate_heads");
  table.attend = attend;
  expect(1, "attend");
  table.join_parts = join_parts;
  expect(1, "join_parts");
  return failures;
}
