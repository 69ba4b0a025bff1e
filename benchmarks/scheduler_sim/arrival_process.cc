#include "scheduler_sim/arrival_process.h"

#include <cmath>
#include <string>

#include "common/errors.h"

namespace lora_serve::sim {
namespace {

constexpr std::uint64_t kArrivalPurpose = 3;

void Check(bool is_good, const std::string& message) {
  if (!is_good) throw InvalidArgumentError("arrivals: " + message);
}

}  // namespace

ArrivalProcess::ArrivalProcess(const ArrivalOptions& options, std::uint64_t seed)
    : options_(options), random_(seed, kArrivalPurpose) {
  Check(options.requests_per_s > 0.0,
        "the rate must be above 0, found " + std::to_string(options.requests_per_s));
  Check(options.burst_factor >= 1.0, "the burst factor must be at least 1");
  Check(options.burst_share > 0.0 && options.burst_share < 1.0,
        "the share of bursts must be between 0 and 1");
  Check(options.burst_factor == 1.0 || options.burst_factor * options.burst_share <= 1.0,
        "burst factor times share of bursts must be at most 1, or the mean rate is exceeded");
  Check(options.burst_s > 0.0, "the length of a burst must be above 0");
}

double ArrivalProcess::CurrentRate() const {
  const double share = options_.burst_share;
  const double factor = options_.burst_factor;
  if (is_burst_) return options_.requests_per_s * factor;
  return options_.requests_per_s * (1.0 - share * factor) / (1.0 - share);
}

TimeUs ArrivalProcess::Next() {
  if (options_.burst_factor == 1.0) {
    now_s_ += random_.NextExponential(1.0 / options_.requests_per_s);
    return std::llround(now_s_ * 1e6);
  }
  for (;;) {
    if (now_s_ >= phase_end_s_) {
      is_burst_ = phase_end_s_ > 0.0 && !is_burst_;  // the run starts outside of a burst
      const double rest_s = options_.burst_s * (1.0 / options_.burst_share - 1.0);
      phase_end_s_ = now_s_ + random_.NextExponential(is_burst_ ? options_.burst_s : rest_s);
    }
    const double rate = CurrentRate();
    const double next_s = rate > 0.0 ? now_s_ + random_.NextExponential(1.0 / rate) : phase_end_s_;
    if (next_s < phase_end_s_) {
      now_s_ = next_s;
      return std::llround(now_s_ * 1e6);
    }
    now_s_ = phase_end_s_;  // exponential gaps have no memory: draw again at the other rate
  }
}

}  // namespace lora_serve::sim
