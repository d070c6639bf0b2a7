// Facts that earlier calls found out about weights. A fact holds until something writes to them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace bitlinear {

// The version of a tensor, to be read before it is examined.
inline int64_t version_of(const at::Tensor& w) { return w.is_inference() ? 0 : w._version(); }

// Facts about packed weights, by their place in memory. Every operation that writes to a tensor
// raises its version, which its views share: so slices of a larger tensor (`w[expert]`) have facts
// of their own, and lose them too. Writes past the version counter (NumPy, `w.data.fill_()`) do not
// invalidate a fact.
template <class Fact>
class WeightFacts {
 public:
  std::optional<Fact> find(const at::Tensor& w, int64_t in_features) {
    if (w.is_inference()) return std::nullopt;  // it has no version counter
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(location_of(w, in_features));
    if (found == entries_.end()) return std::nullopt;
    const Entry& entry = found->second;
    const bool holds = entry.version == w._version() && is_same(entry.counter, counter_of(w)) &&
                       entry.storage._unsafe_get_target() == w.storage().unsafeGetStorageImpl();
    return holds ? std::optional<Fact>(entry.fact) : std::nullopt;
  }

  // A fact about the version of w: one that another thread has written to meanwhile has no facts.
  void add(const at::Tensor& w, int64_t in_features, int64_t version, Fact fact) {
    if (w.is_inference()) return;
    Entry entry{w.storage().getWeakStorageImpl(), counter_of(w), version, std::move(fact)};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entries_.size() >= next_sweep_) sweep();
    entries_.insert_or_assign(location_of(w, in_features), std::move(entry));
  }

  // Around a fork(): its child gets the mutex as it is, and another thread could hold it.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

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
  // The pointers keep the addresses of storage and counter from being reused.
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    c10::VariableVersion counter;
    int64_t version;
    Fact fact;
  };

  static Location location_of(const at::Tensor& w, int64_t in_features) {
    return {w.const_data_ptr(), w.size(0), w.stride(0), w.stride(1), in_features};
  }

  static const c10::VariableVersion& counter_of(const at::Tensor& w) {
    return w.unsafeGetTensorImpl()->version_counter();
  }

  // Whether both are one counter. `w.data` shares the bytes of w and counts for itself, so two of
  // these can have the same version and other bytes. Torch has no function that compares counters;
  // a VariableVersion is a pointer to one.
  static bool is_same(const c10::VariableVersion& a, const c10::VariableVersion& b) {
    static_assert(sizeof(c10::VariableVersion) == sizeof(void*), "torch changed its counter");
    return std::memcmp(&a, &b, sizeof(void*)) == 0;
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

}  // namespace bitlinear
