// Observers that do nothing, to be measured beside recorders: what any recorder must pay for being told of operators,
// with their inputs and outputs collected for it or not. One more counts what it is told.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/record_function.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<uint64_t> num_events{0};
at::CallbackHandle callback = at::INVALID_CALLBACK_HANDLE;

std::unique_ptr<at::ObserverContext> ignore_start(const at::RecordFunction&) { return nullptr; }
void ignore_end(const at::RecordFunction&, at::ObserverContext*) {}

std::unique_ptr<at::ObserverContext> count_start(const at::RecordFunction&) {
  num_events.fetch_add(1, std::memory_order_relaxed);
  return nullptr;
}

// start(inputs, outputs, count): observe this process until stop().
PyObject* py_start(PyObject*, PyObject* args) {
  int inputs = 0;
  int outputs = 0;
  int count = 0;
  if (!PyArg_ParseTuple(args, "ppp", &inputs, &outputs, &count)) return nullptr;
  num_events.store(0);
  callback = at::addGlobalCallback(at::RecordFunctionCallback(count != 0 ? &count_start : &ignore_start, &ignore_end)
                                       .needsInputs(inputs != 0)
                                       .needsOutputs(outputs != 0)
                                       .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION,
                                                at::RecordScope::USER_SCOPE}));
  Py_RETURN_NONE;
}

// stop() -> the number of events counted.
PyObject* py_stop(PyObject*, PyObject*) {
  at::removeCallback(callback);
  return PyLong_FromUnsignedLongLong(num_events.load());
}

PyMethodDef methods[] = {
    {"start", py_start, METH_VARARGS, "start(inputs, outputs, count): observe this process."},
    {"stop", py_stop, METH_NOARGS, "stop() -> number of events counted."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "floor_observer", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_floor_observer() { return PyModule_Create(&module); }
