// Regions: code that runs outside of the dispatcher and says itself what it reads and makes, as a compiled graph does.
// A region is recorded as an operator is, what runs inside it is its own business, and communications are recorded. What
// it only passes on, its inputs and views of them, is none of its results.
#pragma once

#include "observer.h"

namespace truedag {

using Tensors = std::vector<at::Tensor>;

inline void add_list(Session& session, ThreadState& state, const Tensors& tensors, uint16_t arg, bool is_input) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    add_tensor(session, state, state.open.refs, state.open.places, tensors[i], arg, static_cast<uint16_t>(i), is_input);
  }
}

// Knows the inputs again among the results. Their memory may be freed meanwhile; their addresses are not given out again.
inline void remember_given(Region& region, const Tensors& tensors) {
  region.given.clear();
  region.tensor_of.clear();
  for (const auto& tensor : tensors) {
    if (!tensor.has_storage()) continue;
    region.given.emplace_back(tensor.storage().getWeakStorageImpl(), tensor.getIntrusivePtr());
    region.tensor_of.emplace(tensor.storage().unsafeGetStorageImpl(), tensor.unsafeGetTensorImpl());
  }
}

inline bool is_passed_on(const Region& region, const at::Tensor& tensor) {
  if (!tensor.has_storage()) return false;
  const auto known = region.tensor_of.find(tensor.storage().unsafeGetStorageImpl());
  if (known == region.tensor_of.end()) return false;
  return !region.may_reuse || known->second == tensor.unsafeGetTensorImpl();
}

// Begins a region; `may_reuse`: it may make a result in the memory of an input. False where it is inside an operator,
// or on a thread that runs a backend's work.
inline bool open_region(Session& session, ThreadState& state, ThreadSlot& slot, const std::string& name,
                        const std::string& overload, const std::string& schema, const Tensors& read,
                        const Tensors& written, bool may_reuse) {
  if (state.inside > 0 || state.muted) return false;
  auto& open = state.open;
  open.op = session.ops.find_region(name, overload, schema, session.tables);
  open.name = open.op->name.c_str();
  open.event = Event{};
  set_place(open.event, state, slot);
  open.refs.clear();
  open.places.clear();
  add_list(session, state, read, 0, true);
  add_list(session, state, written, 1, true);
  open.num_inputs = static_cast<uint32_t>(open.refs.size());
  state.region.may_reuse = may_reuse;
  remember_given(state.region, read);
  state.has_comm = false;
  state.inside = 1;
  state.frames.push_back(Frame::kRegion);
  open.event.start_ns = now_ns();
  return true;
}

// Ends this thread's region; without results it has failed. Nothing happens where it began in another recording.
inline void close_region(Session& session, ThreadState& state, const Tensors* results) {
  if (state.frames.empty() || state.frames.back() != Frame::kRegion) return;
  const int64_t duration = now_ns() - state.open.event.start_ns;
  state.frames.pop_back();
  state.inside = 0;
  state.open.event.sequence = state.newest_node();
  if (results == nullptr) {
    state.open.event.flags |= kFailed;
  } else {
    Tensors made;
    for (const auto& tensor : *results) {
      if (!is_passed_on(state.region, tensor)) made.push_back(tensor);
    }
    add_list(session, state, made, 0, false);
  }
  state.region.given.clear();
  write_open(session, state, duration);
}

}  // namespace truedag
