// What a communication is known by: its group, sequence number, peer, tag and reduce op when it is called, and an own
// number that reaches the work, on whatever thread that runs, through PyTorch's thread-local debug info.
#pragma once

#include <ATen/record_function.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <type_traits>

#include "slots.h"

namespace truedag {

// Travels with autograd's and c10d's thread-local state to the thread where a communication's work runs.
constexpr std::string_view kCommInfoName = "TRUEDAG_COMM";
template <typename Kind>
Kind own_info_kind() {
  if constexpr (std::is_enum_v<Kind>) {
    return static_cast<Kind>(0xDA);  // PyTorch before 2.13 has kinds by number, and none as high as this
  } else {
    return Kind(&kCommInfoName);
  }
}
inline const auto kCommInfo = own_info_kind<c10::DebugInfoKind>();
struct CommInfo : public c10::DebugInfoBase {
  CommInfo(uint64_t generation, uint32_t id) : generation(generation), id(id) {}
  uint64_t generation;
  uint32_t id;
};

// Kept by PyTorch between the start and the end of a communication's work, which may be on another thread.
struct WorkContext : public at::ObserverContext {
  Work work{};
  uint64_t generation = 0;
  ThreadState* worker = nullptr;  // the backend's thread that runs it
};

inline int64_t backend_sequence(c10d::ProcessGroup& group) {
  try {
    return static_cast<int64_t>(group.getSequenceNumberForGroup());
  } catch (const std::exception&) {
    return -1;  // this backend does not count
  }
}

// A functional collective is waited for by the tensor that it writes, which is one of its arguments.
inline void remember_storages(Session& session, uint32_t comm_id, c10::ArrayRef<const c10::IValue> inputs) {
  const auto remember = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.has_storage()) {
      session.recent.add(comm_id, nullptr, tensor.storage().unsafeGetStorageImpl());
    }
  };
  for (const auto& value : inputs) {
    if (value.isTensor()) remember(value.toTensor());
    if (!value.isTensorList()) continue;
    for (const auto& item : value.toListRef()) {
      if (item.isTensor()) remember(item.toTensor());
    }
  }
}

[[gnu::cold]] inline void open_comm(Session& session, ThreadState& state, const OpEntry& op,
                      c10::ArrayRef<const c10::IValue> inputs) {
  const auto group = inputs[op.group_arg].toCustomClass<c10d::ProcessGroup>();
  Comm comm{};
  comm.sequence = backend_sequence(*group);
  comm.peer = op.peer_arg >= 0 ? static_cast<int32_t>(inputs[op.peer_arg].toInt()) : -1;
  comm.tag = op.tag_arg >= 0 ? static_cast<int32_t>(inputs[op.tag_arg].toInt()) : -1;
  comm.reduce_op = -1;
  if (op.reduce_arg >= 0) {
    comm.reduce_op = static_cast<int32_t>(inputs[op.reduce_arg].toCustomClass<c10d::ReduceOp>()->op_);
  }
  comm.async_op = op.p2p || (op.async_arg >= 0 && inputs[op.async_arg].toBool());
  comm.id = session.next_comm_id.fetch_add(1);
  {
    std::lock_guard<std::mutex> guard(session.groups.mutex);
    auto* entry = session.groups.find(group, session.tables);
    comm.group = entry->id;
    comm.order = op.p2p ? entry->num_p2p++ : entry->num_collectives++;
  }
  remember_storages(session, comm.id, inputs);
  state.open_comm = comm;
  state.has_comm = true;
  c10::ThreadLocalDebugInfo::_push(kCommInfo, std::make_shared<CommInfo>(session.generation, comm.id));
  this_slot->comm_generation = session.generation;
}

inline void close_comm(ThreadSlot& slot) {
  if (slot.comm_generation == 0) return;
  c10::ThreadLocalDebugInfo::_pop(kCommInfo);
  slot.comm_generation = 0;
}

}  // namespace truedag
