#include "scheduler_sim/simulation.h"

#include <algorithm>

#include "common/check.h"

namespace lora_serve::sim {

void Simulate(RequestSource& source, ServingSystem& system) {
  const Recorder& recorder = system.recorder();
  TimeUs now_us = 0;
  system.Process(now_us);  // brings the first adapters to the device, as at the start of an engine
  for (;;) {
    const TimeUs next_us = std::min(source.NextArrivalUs(), system.NextEventUs());
    if (next_us == kNever) break;
    LS_CHECK(next_us >= now_us, "time goes back from ", now_us, " to ", next_us);
    now_us = next_us;
    const std::int64_t num_ended_before = recorder.num_ended() + recorder.num_refused();
    while (source.NextArrivalUs() <= now_us) system.Submit(source.Take(), now_us);
    system.Process(now_us);
    const std::int64_t num_ended = recorder.num_ended() + recorder.num_refused();
    for (std::int64_t count = num_ended_before; count < num_ended; ++count) {
      source.OnRequestEnd(now_us);
    }
  }
  LS_CHECK(recorder.num_live() == 0, "nothing is under way, but ", recorder.num_live(),
           " requests have not ended");
  recorder.CheckAllEnded();
  system.CheckNothingLeft();
}

}  // namespace lora_serve::sim
