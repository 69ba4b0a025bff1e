#pragma once

#include <cstdint>

#include "scheduler_sim/random_stream.h"
#include "scheduler_sim/sim_request.h"

namespace lora_serve::sim {

struct ArrivalOptions {
  /// Mean over the whole run.
  double requests_per_s = 1.0;
  /// Rate within a burst, as a multiple of the mean; 1 = a Poisson process.
  double burst_factor = 1.0;
  /// Share of the time that is burst. burst_factor * burst_share is at most 1.
  double burst_share = 0.2;
  /// Mean length of a burst.
  double burst_s = 2.0;
};

/// When requests arrive: a Poisson process, or one that switches between two rates (bursts and the
/// rest of the time) after times that are exponentially distributed.
class ArrivalProcess {
 public:
  /// Throws: InvalidArgumentError when an option is out of range.
  ArrivalProcess(const ArrivalOptions& options, std::uint64_t seed);

  /// The next arrival; never earlier than the last.
  [[nodiscard]] TimeUs Next();

 private:
  [[nodiscard]] double CurrentRate() const;

  ArrivalOptions options_;
  RandomStream random_;
  double now_s_ = 0.0;
  bool is_burst_ = false;
  double phase_end_s_ = 0.0;
};

}  // namespace lora_serve::sim
