#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "common/strong_id.h"

namespace lora_serve {

/// The namespaces of one adapter generation, or of the base model, besides that of the default
/// domain: one an isolation domain that requests came from.
///
/// AdapterTable opens one with the first request of its domain and drains all of them with the
/// adapter. One that nobody uses is dropped when many exist, so that names made up by clients cost
/// no memory for ever: first those without pages, then the least recently used.
struct AdapterDomains {
  struct Domain {
    NamespaceId namespace_id;
    /// In the order of requests.
    std::int64_t last_used = 0;
  };

  std::map<std::string, Domain> by_name;
  // What dropped ones had counted.
  std::int64_t num_dropped_hit_tokens = 0;
  std::int64_t num_dropped_missed_tokens = 0;
};

}  // namespace lora_serve
