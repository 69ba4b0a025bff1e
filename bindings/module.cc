#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The C++ core of lora_serve. Imported by lora_serve.scheduler and "
      "lora_serve.lora.peft_reader only.";
  lora_serve::bindings::BindErrors(module);
  lora_serve::bindings::BindPlan(module);
  lora_serve::bindings::BindSchedulerOptions(module);
  lora_serve::bindings::BindStats(module);
  lora_serve::bindings::BindKVEvents(module);
  lora_serve::bindings::BindScheduler(module);
  lora_serve::bindings::BindAdapterWeights(module);
}
