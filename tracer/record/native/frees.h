// When memory is given back. A storage that an operator takes or returns gets a deleter that writes down the time and
// then calls the allocator's own; the memory and its context stay what they were, so nothing else changes, also not for
// storages that outlive the recording. A storage on device meta has no memory, and a context of nothing, for which no
// deleter is called: it gets itself as its context, and still no memory.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>

#include "slots.h"

namespace truedag {

inline c10::DeleterFnPtr cpu_deleter = nullptr;  // of PyTorch's allocator for host memory; null: it has none of this kind

inline void note_free(void* address) noexcept {
  try {
    const Recorded here;
    if (!here) return;
    const Free free{now_ns(), reinterpret_cast<uint64_t>(address)};
    here.state->frees.append(&free, sizeof(free));
  } catch (const std::exception& error) {
    switch_off(error.what());
  }
}

inline void note_and_free(void* address) {
  note_free(address);
  cpu_deleter(address);
}

inline void note_end(void* storage) { note_free(reinterpret_cast<void*>(reinterpret_cast<uint64_t>(storage) | 1)); }

inline void watch_free(c10::StorageImpl* storage) {
  auto& data = storage->_mutable_data_ptr_no_checks();
  if (storage->device_type() == c10::kMeta) {
    if (data.get() == nullptr && data.get_context() == nullptr) {
      storage->set_data_ptr_noswap(c10::DataPtr(nullptr, storage, &note_end, data.device()));
    }
    return;
  }
  if (data.get_deleter() != cpu_deleter || data.get_context() != data.get() || data.get() == nullptr) return;
  const bool swapped = data.compare_exchange_deleter(cpu_deleter, &note_and_free);
  (void)swapped;
}

inline void find_cpu_deleter() {
  if (cpu_deleter == nullptr) cpu_deleter = c10::GetCPUAllocator()->raw_deleter();
}

}  // namespace truedag
