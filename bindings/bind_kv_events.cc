#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kv_prefix_cache/cache_options.h"
#include "scheduler/scheduler.h"

namespace lora_serve::bindings {

namespace py = pybind11;

// An event is handed over as it is: its long lists become Python's only when they are asked for,
// which a thread other than the step loop's may do.
void BindKVEvents(py::module_& module) {
  py::class_<AdapterKVEvent>(module, "KVEvent", R"doc(
Pages of one namespace that came to a tier or left it. Immutable; any thread may read it.

A page's hash is a chain over all tokens before it, seeded by the generation's ``digest_seed``.
)doc")
      .def_property_readonly(
          "is_stored",
          [](const AdapterKVEvent& self) { return self.event.kind == KVEventKind::kStored; },
          "True when the pages came, False when they left.")
      .def_property_readonly(
          "is_on_host", [](const AdapterKVEvent& self) { return self.event.tier == Tier::kHost; },
          "Whether it is about the host tier, not the device's.")
      .def_property_readonly(
          "adapter_id",
          [](const AdapterKVEvent& self) -> std::optional<std::int64_t> {
            if (!self.adapter_id.has_value()) return std::nullopt;
            return self.adapter_id->value();
          },
          "The generation, 0 = the base model; None only of removed pages, when it is gone.")
      .def_property_readonly(
          "is_private", [](const AdapterKVEvent& self) { return self.is_private; },
          "Whether only requests of one isolation domain can use the pages; False where the "
          "generation is gone.")
      .def_property_readonly(
          "parent_hash", [](const AdapterKVEvent& self) { return self.event.parent_hash; },
          "Hash of the page before the first one; None when that is the first of its sequence.")
      .def_property_readonly(
          "page_hashes", [](const AdapterKVEvent& self) { return self.event.page_hashes; },
          "list of int, 64 bits each, in the order of the sequence.")
      .def_property_readonly(
          "token_ids", [](const AdapterKVEvent& self) { return self.event.token_ids; },
          "list of int, ``page_size`` a page; empty of removed pages.");
}

}  // namespace lora_serve::bindings
