#pragma once

#include <pybind11/pybind11.h>

namespace lora_serve::bindings {

/// Each binds one part of the core into the module; called once, in this order, by module.cc.
void BindErrors(pybind11::module_& module);
void BindPlan(pybind11::module_& module);
void BindSchedulerOptions(pybind11::module_& module);
void BindStats(pybind11::module_& module);
void BindKVEvents(pybind11::module_& module);
void BindScheduler(pybind11::module_& module);
void BindAdapterWeights(pybind11::module_& module);

}  // namespace lora_serve::bindings
