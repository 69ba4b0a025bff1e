#pragma once

#include <pybind11/pybind11.h>

#include "scheduler/execution_plan.h"

namespace lora_serve::bindings {

/// What Python knows as ExecutionPlan: the plan, and the array that its block was written into. A
/// member, not py::keep_alive: pybind11 3.1 applies that also to calls whose arguments it has
/// refused, and crashes.
struct PythonPlan : ExecutionPlan {
  pybind11::object block_owner;
};

}  // namespace lora_serve::bindings
