// A cache of packed weights whose codes are valid. A call checks the weights that are not in it:
// arithmetic on the bytes, such as an average over buffers, makes codes that no kernel can read.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <mutex>
#include <unordered_map>

namespace bitlinear {

// The key is the address, the storage and its version, which every operation that writes to a
// tensor raises. So slices of a larger tensor hit too. Writes past the version counter (NumPy,
// `.data`) do not invalidate an entry.
class CheckedWeights {
 public:
  bool contains(const at::Tensor& w, int64_t in_features) {
    if (w.is_inference()) return false;  // it has no version counter
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(location_of(w, in_features));
    // The weak pointer keeps the address of the storage from being reused.
    return found != entries_.end() && found->second.version == w._version() &&
           found->second.storage._unsafe_get_target() == w.storage().unsafeGetStorageImpl();
  }

  void add(const at::Tensor& w, int64_t in_features) {
    if (w.is_inference()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entries_.size() >= next_sweep_) sweep();
    entries_.insert_or_assign(location_of(w, in_features),
                              Entry{w.storage().getWeakStorageImpl(), w._version()});
  }

 private:
  struct Location {
    const void* data;
    int64_t rows, row_stride, byte_stride, in_features;
    bool operator==(const Location& other) const {
      return data == other.data && rows == other.rows && row_stride == other.row_stride &&
             byte_stride == other.byte_stride && in_features == other.in_features;
    }
  };
  struct Hash {
    size_t operator()(const Location& location) const {
      return std::hash<const void*>()(location.data);
    }
  };
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t version;
  };

  static Location location_of(const at::Tensor& w, int64_t in_features) {
    return {w.const_data_ptr(), w.size(0), w.stride(0), w.stride(1), in_features};
  }

  void sweep() {
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      entry = entry->second.storage.expired() ? entries_.erase(entry) : std::next(entry);
    }
    next_sweep_ = 2 * entries_.size() + 64;
  }

  std::mutex mutex_;
  std::unordered_map<Location, Entry, Hash> entries_;
  size_t next_sweep_ = 64;
};

inline CheckedWeights& checked_weights() {
  static auto* const weights = new CheckedWeights;  // outlives every thread
  return *weights;
}

// The position of the first byte of a row that holds a code 3, or a weight other than 0 past K; -1
// if there is none.
inline int64_t find_invalid_byte(const uint8_t* row, int64_t K) {
  const int64_t bytes = (K + 3) / 4;
  int64_t b = 0;
  // Code 3 has both bits of its pair set.
  for (; b + 8 <= bytes; b += 8) {
    uint64_t word;
    memcpy(&word, row + b, sizeof(word));
    if ((word & word >> 1 & 0x5555555555555555u) != 0) break;
  }
  for (; b < bytes; ++b) {
    if ((row[b] & row[b] >> 1 & 0x55) != 0) return b;
  }
  const int unused = (1 << 2 * (4 * bytes - K)) - 1;
  return ((row[bytes - 1] ^ 0x55) & unused) != 0 ? bytes - 1 : -1;
}

// Raises ValueError for the first invalid byte of the weights, with the message of packing.py.
[[noreturn]] inline void report_invalid_byte(uint8_t byte, int64_t n, int64_t b, int64_t K) {
  const bool has_code3 = (byte & byte >> 1 & 0x55) != 0;
  const char* const digits = "0123456789abcdef";
  TORCH_CHECK_VALUE(!has_code3, "bitlinear: w_packed holds the invalid code 3, first in byte ", b,
                    " of row ", n, " (0x", digits[byte >> 4], digits[byte & 15],
                    "): the bytes were changed (averaged, for example) or damaged, or are not in "
                    "packed format version 1");
  TORCH_CHECK_VALUE(false, "bitlinear: w_packed has weights beyond in_features = ", K,
                    ": it was packed for a layer with up to ", 4 * ((K + 3) / 4));
}

}  // namespace bitlinear
