// Operators: what each is to the recorder, found out once a process, and the calls of them: which argument or result
// each tensor of an event is.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tables.h"

namespace truedag {

enum class OpClass : uint8_t {
  kTransparent,  // what it calls are the operators: CompositeImplicitAutograd kernels, functional collectives; and what
                 // is no operator of the dispatcher: autograd's functions, its engine
  kLeaf,         // an operator; what it calls inside is its own business
  kComm,         // an operator of c10d with a process group
  kWait,         // waits for a functional collective; what it calls is walked through
};

struct OpEntry {
  std::string name;
  std::string told;  // its entry in the tables
  uint32_t id = 0;
  OpClass kind = OpClass::kTransparent;
  bool stable = false;  // the name's address belongs to a schema and is never used again
  std::atomic<bool> closed{false};  // a kernel of PyTorch's own: nothing inside it is of any interest
  uint32_t num_arguments = 0;  // by its schema
  uint32_t num_results = 0;
  int group_arg = -1;
  int peer_arg = -1;
  int tag_arg = -1;
  int reduce_arg = -1;
  int async_arg = -1;
  bool p2p = false;
  bool has_cpu_kernel = false;  // of its own, beside a composite one
  bool has_cuda_kernel = false;
};

// How an operator is announced: by whichever of its events, or by its handle.
struct Announced {
  const char* name;
  std::optional<c10::OperatorName> operator_name;
  at::RecordScope scope;

  explicit Announced(const at::RecordFunction& fn)
      : name(fn.name()), operator_name(fn.operator_name()), scope(fn.scope()) {}
  explicit Announced(const c10::OperatorHandle& handle)
      : name(handle.schema().name().c_str()),
        operator_name(handle.operator_name()),
        scope(at::RecordScope::FUNCTION) {}
};

// All operators that any recording of this process has seen, by name, overload and scope. Entries stay for good.
class Operators {
 public:
  OpEntry* find(const Announced& announced) {
    std::string key(announced.name);
    if (announced.operator_name.has_value()) key += "." + announced.operator_name->overload_name;
    key += static_cast<char>('0' + static_cast<int>(announced.scope));
    std::lock_guard<std::mutex> guard(mutex_);
    auto& slot = entries_[key];
    if (slot == nullptr) slot = make(announced.name, announced.operator_name);
    return slot.get();
  }

  // What is no operator of the dispatcher, and says itself what it is.
  OpEntry* find_region(const std::string& name, const std::string& overload, const std::string& schema) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto& slot = entries_[name + "." + overload + "#"];
    if (slot == nullptr) {
      slot = std::make_unique<OpEntry>();
      slot->name = name;
      slot->id = static_cast<uint32_t>(entries_.size());
      slot->kind = OpClass::kLeaf;
      slot->told = tell(name, overload, schema, false);
    }
    return slot.get();
  }

 private:
  static std::string tell(const std::string& name, const std::string& overload, const std::string& schema,
                          bool inplace_view) {
    return "{\"name\":" + json_string(name) + ",\"overload\":" + json_string(overload) +
           ",\"schema\":" + json_string(schema) + ",\"inplace_view\":" + (inplace_view ? "true" : "false") + "}";
  }

  std::unique_ptr<OpEntry> make(const char* name, const std::optional<c10::OperatorName>& operator_name) {
    auto entry = std::make_unique<OpEntry>();
    entry->name = name;
    entry->id = static_cast<uint32_t>(entries_.size());
    std::string overload;
    std::string schema_text;
    bool inplace_view = false;
    if (operator_name.has_value()) {
      entry->stable = true;
      overload = operator_name->overload_name;
      const auto handle = c10::Dispatcher::singleton().findOp(*operator_name);
      if (handle.has_value() && handle->hasSchema()) {
        const auto& schema = handle->schema();
        std::ostringstream text;
        text << schema;
        schema_text = text.str();
        inplace_view = handle->hasTag(at::Tag::inplace_view);
        entry->num_arguments = static_cast<uint32_t>(schema.arguments().size());
        entry->num_results = static_cast<uint32_t>(schema.returns().size());
        entry->kind = classify(*handle, *operator_name, *entry);
        if (entry->kind == OpClass::kTransparent && operator_name->name.rfind("aten::", 0) == 0) {
          entry->has_cpu_kernel = handle->hasKernelForDispatchKey(c10::DispatchKey::CPU);
          entry->has_cuda_kernel = handle->hasKernelForDispatchKey(c10::DispatchKey::CUDA);
        }
        const bool may_be_leaf = entry->kind == OpClass::kLeaf || entry->has_cpu_kernel || entry->has_cuda_kernel;
        entry->closed = may_be_leaf && operator_name->name.rfind("aten::", 0) == 0 &&
                        !has_python_kernel(*handle);
      }
    }
    entry->told = tell(entry->name, overload, schema_text, inplace_view);
    return entry;
  }

  // Whether a program has put a kernel of its own, written in Python, in the place of one of PyTorch's.
  static bool has_python_kernel(const c10::OperatorHandle& handle) {
    std::istringstream lines(handle.dumpComputedTable());
    for (std::string line; std::getline(lines, line);) {
      const bool is_run = line.rfind("CPU", 0) == 0 || line.rfind("CUDA", 0) == 0 || line.rfind("Autograd", 0) == 0 ||
                          line.rfind("Autocast", 0) == 0;
      if (is_run && line.find(".py:") != std::string::npos) return true;
    }
    return false;
  }

  static OpClass classify(const c10::OperatorHandle& handle, const c10::OperatorName& name, OpEntry& entry) {
    const auto starts = [&](const char* prefix) { return name.name.rfind(prefix, 0) == 0; };
    if (name.name == "_c10d_functional::wait_tensor") return OpClass::kWait;
    if (starts("profiler::") || starts("_c10d_functional::") || starts("c10d_functional::")) {
      return OpClass::kTransparent;
    }
    if (starts("c10d::")) {
      const auto& arguments = handle.schema().arguments();
      for (int i = 0; i < static_cast<int>(arguments.size()); ++i) {
        const auto& argument = arguments[i].name();
        if (argument == "process_group") entry.group_arg = i;
        if (argument == "root_rank" || argument == "src" || argument == "dst") entry.peer_arg = i;
        if (argument == "tag") entry.tag_arg = i;
        if (argument == "reduce_op") entry.reduce_arg = i;
        if (argument == "async_op") entry.async_arg = i;
      }
      entry.p2p = starts("c10d::send") || starts("c10d::recv");
      if (entry.group_arg >= 0) return OpClass::kComm;
    }
    return handle.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) ? OpClass::kTransparent
                                                                                       : OpClass::kLeaf;
  }

  std::mutex mutex_;
  std::unordered_map<std::string, std::unique_ptr<OpEntry>> entries_;
};
inline Operators* operators = new Operators();  // outlives every thread

// Counts operators that were taken back: the address of such a one's name may be given to another.
inline std::atomic<uint64_t> operators_gone{0};

class GoneOperators : public c10::OpRegistrationListener {
 public:
  void onOperatorRegistered(const c10::OperatorHandle&) override {}
  void onOperatorDeregistered(const c10::OperatorHandle&) override {
    operators_gone.fetch_add(1, std::memory_order_relaxed);
  }
};

// Which operators this recording has written to its tables.
class OpTable {
 public:
  [[gnu::cold]] OpEntry* find(const Announced& announced, TableWriter& tables) {
    return note(operators->find(announced), tables);
  }

  OpEntry* find_region(const std::string& name, const std::string& overload, const std::string& schema,
                       TableWriter& tables) {
    return note(operators->find_region(name, overload, schema), tables);
  }

 private:
  OpEntry* note(OpEntry* entry, TableWriter& tables) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (entry->id >= written_.size()) written_.resize(entry->id + 256);
    if (!written_[entry->id]) {
      tables.write(kOp, entry->id, entry->told);
      written_[entry->id] = true;
    }
    return entry;
  }

  std::mutex mutex_;
  std::vector<bool> written_;
};

// How an operator was called. Payload: op, number of inputs, number of outputs, then arg and element of each.
struct Call {
  uint32_t id;
  uint32_t num_inputs;
  std::vector<uint32_t> places;  // element << 16 | arg, of inputs, then of outputs

  bool same(uint32_t inputs, const std::vector<uint32_t>& wanted) const {
    return num_inputs == inputs && places.size() == wanted.size() &&
           std::memcmp(places.data(), wanted.data(), wanted.size() * sizeof(uint32_t)) == 0;
  }
};

class CallTable {
 public:
  [[gnu::cold]] const Call* find(uint32_t op, uint32_t num_inputs, const std::vector<uint32_t>& places,
                                 TableWriter& tables) {
    uint64_t hash = mix(op, num_inputs);
    for (const auto place : places) hash = mix(hash, place);
    std::lock_guard<std::mutex> guard(mutex_);
    auto& bucket = entries_[hash];
    for (const auto& [known_op, call] : bucket) {
      if (known_op == op && call->same(num_inputs, places)) return call.get();
    }
    auto call = std::make_unique<Call>(Call{count_ + 1, num_inputs, places});
    const uint32_t head[3] = {op, num_inputs, static_cast<uint32_t>(places.size()) - num_inputs};
    std::string payload(reinterpret_cast<const char*>(head), sizeof(head));
    payload.append(reinterpret_cast<const char*>(places.data()), places.size() * sizeof(uint32_t));
    tables.write(kCall, call->id, payload);
    ++count_;
    bucket.emplace_back(op, std::move(call));
    return bucket.back().second.get();
  }

 private:
  std::mutex mutex_;
  uint32_t count_ = 0;
  std::unordered_map<uint64_t, std::vector<std::pair<uint32_t, std::unique_ptr<Call>>>> entries_;
};

}  // namespace truedag
