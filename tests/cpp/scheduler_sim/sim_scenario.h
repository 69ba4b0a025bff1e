#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "scheduler_sim/adapter_catalog.h"
#include "scheduler_sim/device_model.h"
#include "scheduler_sim/request_source.h"
#include "scheduler_sim/serving_system.h"
#include "scheduler_sim/sim_options.h"
#include "scheduler_sim/simulation.h"

namespace lora_serve::sim::testing {

/// A device whose times can be added up in the head: a step takes 10 ms and 0.1 ms for each prompt
/// token; an adapter has 1 MB for each rank, is copied in 20 ms and read in 100 ms, whatever its
/// size.
inline const std::string kSimpleDevice =
    "adapter_bytes_per_rank=1e6\n"
    "step.base_ms=10\n"
    "step.per_prefill_token_us=100\n"
    "loads.host_to_device.fixed_ms=20\n"
    "loads.host_to_device.gb_per_s=1e9\n"
    "loads.disk_warm_to_host.fixed_ms=100\n"
    "loads.disk_warm_to_host.gb_per_s=1e9\n"
    "loads.disk_warm_to_host.num_parallel=2\n"
    "loads.disk_cold_to_host.fixed_ms=300\n"
    "loads.disk_cold_to_host.gb_per_s=1e9\n";

inline DeviceModel MakeDevice(const std::string& text = kSimpleDevice) {
  std::istringstream input(text);
  return DeviceModel::Read(input);
}

/// A request of the test's own choice.
inline SimRequest MakeRequest(std::int64_t id, std::int64_t adapter_id, TimeUs arrival_us,
                              std::int32_t num_prompt_tokens, std::int32_t num_output_tokens) {
  SimRequest request;
  request.id = id;
  request.adapter_id = adapter_id;
  request.arrival_us = arrival_us;
  for (std::int32_t token = 0; token < num_prompt_tokens; ++token) {
    request.prompt_token_ids.push_back(static_cast<TokenId>(1000 * id + token));
  }
  request.max_tokens = num_output_tokens;
  request.num_output_tokens = num_output_tokens;
  return request;
}

/// Gives out a list of requests.
class ListSource : public RequestSource {
 public:
  explicit ListSource(std::vector<SimRequest> requests) : requests_(std::move(requests)) {}
  [[nodiscard]] TimeUs NextArrivalUs() const override {
    return next_ < requests_.size() ? requests_[next_].arrival_us : kNever;
  }
  [[nodiscard]] SimRequest Take() override { return requests_[next_++]; }

 private:
  std::vector<SimRequest> requests_;
  std::size_t next_ = 0;
};

/// One run, with everything that it needs kept alive.
class ServedRun {
 public:
  /// Options as on the command line.
  ServedRun(const std::vector<std::string>& arguments,
            std::unique_ptr<RequestSource> source = nullptr,
            const std::string& device = kSimpleDevice)
      : options_(ParseSimOptions(arguments)),
        device_(MakeDevice(device)),
        catalog_(device_, options_.workload.popularity.num_adapters,
                 ParseRanks(options_.lora_ranks)),
        source_(source ? std::move(source) : MakeRequestSource(options_.workload)),
        system_(MakeSystem(options_, device_, catalog_)) {
    Simulate(*source_, *system_);
  }

  [[nodiscard]] const Recorder& recorder() const { return system_->recorder(); }
  [[nodiscard]] const RequestRecord& request(std::size_t id) const {
    return recorder().requests().at(id);
  }
  [[nodiscard]] SystemCounts counts() const { return system_->Counts(); }
  [[nodiscard]] const ServingSystem& system() const { return *system_; }
  /// From its arrival, in milliseconds.
  [[nodiscard]] double FirstTokenMs(std::size_t id) const {
    return static_cast<double>(request(id).first_token_us - request(id).arrival_us) / 1e3;
  }

 private:
  SimOptions options_;
  DeviceModel device_;
  AdapterCatalog catalog_;
  std::unique_ptr<RequestSource> source_;
  std::unique_ptr<ServingSystem> system_;
};

}  // namespace lora_serve::sim::testing
