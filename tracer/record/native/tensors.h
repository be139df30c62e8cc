// How tensors are named: by the numbers of their storage, layout and offset, each looked up in this thread's caches
// first and in the session's tables else.
#pragma once

#include <ATen/core/ivalue.h>

#include "frees.h"
#include "slots.h"

namespace truedag {

inline bool has_place(const at::TensorImpl* impl) {
  return impl->has_storage() && impl->layout() == c10::kStrided && !impl->is_nested() &&
         !impl->has_symbolic_sizes_strides();
}

// The number of a storage; says so where it has other memory than this thread saw last.
inline uint32_t find_storage(Session& session, ThreadState& state, c10::StorageImpl* storage, const void* data,
                             uint64_t bytes, bool is_input) {
  Caches& caches = state.caches();
  auto& known = caches.storages[(reinterpret_cast<uint64_t>(storage) >> 4) % caches.storages.size()];
  if (known.impl == storage && known.data == data && known.bytes == bytes) return known.id;
  bool is_new = false;
  const uint32_t id =
      known.impl == storage ? known.id : session.storages.find(storage, data, bytes, is_input, is_new);
  if (is_new) {
    watch_free(storage);
  } else {
    const Place other{id, static_cast<uint32_t>(state.events.count()), reinterpret_cast<uint64_t>(data), bytes};
    state.places.append(&other, sizeof(other));
  }
  known = {storage, data, bytes, id};
  return id;
}

inline const LayoutEntry* find_layout(Session& session, ThreadState& state, const at::TensorImpl* impl) {
  const auto dtype = static_cast<int32_t>(c10::typeMetaToScalarType(impl->dtype()));
  const auto device = static_cast<int32_t>(impl->device_type());
  const auto itemsize = static_cast<int32_t>(impl->dtype().itemsize());
  const auto sizes = impl->sizes();
  const auto strides = impl->strides();
  const uint64_t hash = hash_layout(dtype, device, sizes, strides);
  Caches& caches = state.caches();
  auto& known = caches.layouts[hash % caches.layouts.size()];
  if (known == nullptr || !known->same(dtype, device, sizes, strides)) {
    known = session.layouts.find(hash, dtype, device, itemsize, sizes, strides, session.tables);
  }
  return known;
}

// Where a tensor lies, by the tables' numbers.
inline Tensor find_place(Session& session, ThreadState& state, const at::TensorImpl* impl, const LayoutEntry* layout,
                         bool is_input) {
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const void* data = storage->_mutable_data_ptr_no_checks().get();
  const uint32_t id = find_storage(session, state, storage, data, storage->nbytes(), is_input);
  return {impl->storage_offset() * static_cast<int64_t>(impl->dtype().itemsize()), id, layout->id};
}

// The number of a tensor on this thread; 0: memory that cannot be named.
inline Ref name_tensor(Session& session, ThreadState& state, const at::TensorImpl* impl, bool is_input) {
  if (!has_place(impl)) return 0;
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!is_input) watch_free(storage);
  const void* data = storage->_mutable_data_ptr_no_checks().get();
  const uint64_t bytes = storage->nbytes();
  const int64_t offset = impl->storage_offset();
  Caches& caches = state.caches();
  auto& known = caches.tensors[(reinterpret_cast<uint64_t>(impl) >> 4) % caches.tensors.size()];
  const bool is_layout =
      known.layout != nullptr && known.layout->same(static_cast<int32_t>(c10::typeMetaToScalarType(impl->dtype())),
                                                    static_cast<int32_t>(impl->device_type()), impl->sizes(),
                                                    impl->strides());
  if (is_layout && known.storage == storage && known.offset == offset) {
    // Another tensor may have been on this storage since, with other memory: what was seen last counts.
    find_storage(session, state, storage, data, bytes, is_input);
    return known.id;
  }
  const LayoutEntry* layout = is_layout ? known.layout : find_layout(session, state, impl);
  const Tensor tensor = find_place(session, state, impl, layout, is_input);
  auto& number = caches.ids[mix(tensor.offset_bytes ^ uint64_t{tensor.storage} << 32, tensor.layout) %
                            caches.ids.size()];
  if (number.id == 0 || std::memcmp(&number.tensor, &tensor, sizeof(tensor)) != 0) {
    state.tensors.append(&tensor, sizeof(tensor));
    number = {tensor, static_cast<uint32_t>(state.tensors.count())};
  }
  known = {storage, offset, layout, number.id};
  return number.id;
}

inline void add_tensor(Session& session, ThreadState& state, std::vector<Ref>& refs, std::vector<uint32_t>& places,
                       const at::Tensor& tensor, uint16_t arg, uint16_t element, bool is_input) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  // A number that became a tensor on the way is a constant of the call, not data that flowed.
  if (!tensor.defined() || impl->is_wrapped_number()) return;
  refs.push_back(name_tensor(session, state, impl, is_input));
  places.push_back(static_cast<uint32_t>(element) << 16 | arg);
}

inline void add_value(Session& session, ThreadState& state, std::vector<Ref>& refs, std::vector<uint32_t>& places,
                      const c10::IValue& value, uint16_t arg, uint16_t& element, bool is_input) {
  if (value.isTensor()) {
    add_tensor(session, state, refs, places, value.toTensor(), arg, element, is_input);
    if (element != 0xffff) ++element;  // of a longer list, the rest are its last
  } else if (value.isList()) {
    for (const auto& item : value.toListRef()) {
      if (!item.isTensor() && !item.isList() && !item.isNone()) break;
      add_value(session, state, refs, places, item, arg, element, is_input);
    }
  } else if (value.isTuple()) {
    for (const auto& item : value.toTupleRef().elements()) {
      add_value(session, state, refs, places, item, arg, element, is_input);
    }
  }
}

}  // namespace truedag
