// Runs one kernel of one Arm variant a number of times. instruction_count.py counts the
// instructions of two programs that differ by one run.
//
// Usage: program quantize|gemv|gemm|call M N K GROUP_SIZE runs. KERNEL is the file of the variant,
// VARIANT its vocabulary, GEMM its form for many tokens, GROUP_GEMM the one for scales of groups.
#include KERNEL
#include <stdlib.h>

#include <algorithm>
#include <string>
#include <vector>

using namespace bitlinear;

int main(int, char** arguments) {
  const std::string form = arguments[1];
  const int64_t group_bytes = atol(arguments[5]) / 4;
  const int64_t M = atol(arguments[2]), N = atol(arguments[3]), K = atol(arguments[4]);
  const int64_t row_bytes = ceil_div(K, 4), q_stride = bitlinear_q_stride(&kTable, K);
  const std::vector<float> x(static_cast<size_t>(M * K), 1.0f);
  const std::vector<uint8_t> w(static_cast<size_t>(N * row_bytes), 0x55);
  const int64_t groups = group_bytes > 0 ? ceil_div(row_bytes, group_bytes) : 0;
  const std::vector<float> s_w(static_cast<size_t>(1 + N * groups), 1.0f);
  std::vector<int8_t> q(static_cast<size_t>(M * q_stride));
  std::vector<float> s_x(static_cast<size_t>(M)), y(static_cast<size_t>(M * N));
  std::vector<int32_t> q_sum(static_cast<size_t>(M));
  const int64_t scratch_bytes = std::max({GEMM::scratch_bytes(M, row_bytes),
                                          GROUP_GEMM::scratch_bytes(M, row_bytes, group_bytes),
                                          GroupGemv<VARIANT>::scratch_bytes(M, row_bytes, 0)});

  bitlinear_task task = {};
  const bitlinear_prologue plain = {};
  task.act_bits = 8;
  task.q = q.data();
  task.q_stride = q_stride;
  task.s_x = s_x.data();
  task.q_sum = q_sum.data();
  task.M = M;
  task.w = w.data();
  task.row_bytes = row_bytes;
  task.group_bytes = group_bytes;
  task.s_w = s_w.data();
  task.s_w_stride = groups;
  task.n_end = N;
  task.y = y.data();
  task.y_stride = N;
  task.scratch = aligned_alloc(64, static_cast<size_t>(round_up(scratch_bytes, 64)));
  const bool has_groups = group_bytes > 0;
  for (int64_t run = atol(arguments[6]); run > 0; --run) {
    if (form == "gemv") has_groups ? GroupGemv<VARIANT>::run(task) : gemv<VARIANT>(task);
    if (form == "gemm") has_groups ? GROUP_GEMM::run(task) : GEMM::run(task);
    if (form == "call") kTable.linear(&task);
    if (form != "quantize") continue;
    for (int64_t m = 0; m < M; ++m) {
      kTable.quantize_row(&plain, x.data() + m * K, BITLINEAR_F32, K, 1e-6f, 8, nullptr,
                          q.data() + m * q_stride, q_stride, &s_x[m], &q_sum[m]);
    }
  }
}
