// The heuristics, and the division of a call among threads, as a library that ctypes can load.
#include "cpu/heuristics.h"

#include <thread>
#include <vector>

#include "cpu/shared_parts.h"

extern "C" {

bool prefer_gemm(int64_t M, int64_t vectors_per_row, int64_t gemm_tokens, int64_t gemv_overhead) {
  return bitlinear::prefer_gemm(M, vectors_per_row, gemm_tokens, gemv_overhead);
}

bool pays_for_threads(int64_t work, int64_t threads) {
  return bitlinear::pays_for_threads(work, threads);
}

void part_of(int64_t size, int64_t unit, int64_t index, int64_t parts, int64_t* out) {
  const bitlinear::Range range = bitlinear::part_of(size, unit, index, parts);
  out[0] = range.begin;
  out[1] = range.end;
}

int64_t largest_part(int64_t size, int64_t unit, int64_t parts) {
  return bitlinear::largest_part(size, unit, parts);
}

void choose_grid(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
                 const bitlinear_costs* costs, int64_t* out) {
  const bitlinear::Grid grid = bitlinear::choose_grid(M, N, row_bytes, threads, *costs);
  out[0] = grid.tokens;
  out[1] = grid.rows;
}

int64_t choose_pieces(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
                      const bitlinear_costs* costs) {
  return bitlinear::choose_pieces(M, N, row_bytes, threads, *costs).count();
}

bool each_quantizes(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
                    const bitlinear_costs* costs, bool is_plain) {
  const bitlinear::Pieces pieces = bitlinear::choose_pieces(M, N, row_bytes, threads, *costs);
  const int64_t parts = bitlinear::choose_quantize_parts(M, 4 * row_bytes, threads, pieces.count());
  return bitlinear::each_quantizes(pieces, parts, M, 4 * row_bytes, N, threads, is_plain);
}

void piece_of(int64_t M, int64_t N, int64_t row_bytes, int64_t threads,
              const bitlinear_costs* costs, int64_t index, int64_t* out) {
  const bitlinear::Pieces pieces = bitlinear::choose_pieces(M, N, row_bytes, threads, *costs);
  const bitlinear::Rectangle piece = bitlinear::piece_of(M, N, *costs, pieces, index);
  out[0] = piece.tokens.begin;
  out[1] = piece.tokens.end;
  out[2] = piece.rows.begin;
  out[3] = piece.rows.end;
}

int64_t choose_quantize_parts(int64_t M, int64_t K, int64_t threads, int64_t parts) {
  return bitlinear::choose_quantize_parts(M, K, threads, parts);
}

// runs[part] = how many times the part ran; thread_of[part] = the thread that ran it last;
// bodies[thread] = how many functions the thread asked for. Thread `slow` is stuck in its first
// part until the others are done; -1 for none.
void run_shared_parts(int64_t parts, int64_t threads, int64_t slow, int64_t* runs,
                      int64_t* thread_of, int64_t* bodies) {
  bitlinear::SharedParts shared(parts, threads);
  std::vector<std::atomic<int64_t>> counts(static_cast<size_t>(parts));
  std::atomic<int64_t> done{0};
  const auto work = [&](int64_t thread) {
    shared.run(thread, [&](int64_t of_thread) {
      ++bodies[of_thread];
      return [&, of_thread](int64_t part) {
        counts[static_cast<size_t>(part)].fetch_add(1);
        thread_of[part] = of_thread;
        while (of_thread == slow && done.load() < threads - 1) std::this_thread::yield();
      };
    });
    done.fetch_add(1);
  };
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) pool.emplace_back(work, i);
  for (std::thread& thread : pool) thread.join();
  for (int64_t i = 0; i < parts; ++i) runs[i] = counts[static_cast<size_t>(i)].load();
}
}
