// A "cuda:0" whose memory is the host's, for a CPU-only build of PyTorch: its kernels are the CPU's, on the same bytes.
//
// It keeps of a real device: tensors carry device cuda:0, and so do autograd, autocast and serialisation; NumPy and
// pointers on the CPU do not read them; the autograd engine gives it a thread of its own; an operation whose operands lie
// on different devices fails with PyTorch's message.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include "operations.h"

namespace {

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const {
    return kCuda;
  }
  Device getDevice() const {
    return kCuda;
  }
  c10::Stream getStream(Device) const noexcept {
    return c10::Stream(c10::Stream::DEFAULT, kCuda);
  }
  c10::Stream getDefaultStream(Device) const {
    return c10::Stream(c10::Stream::DEFAULT, kCuda);
  }
  c10::Stream getNewStream(Device, int) const {
    return c10::Stream(c10::Stream::DEFAULT, kCuda);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept {
    return c10::Stream(c10::Stream::DEFAULT, kCuda);
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const {
    return true;
  }
  void synchronizeEvent(void*) const {}
  void synchronizeDevice(const c10::DeviceIndex) const {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const {}
};

struct Hooks : at::CUDAHooksInterface {
  void init() const {}
  bool isBuilt() const {
    return true;
  }
  bool isAvailable() const {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const {
    return true;
  }
  c10::DeviceIndex deviceCount() const {
    return 1;
  }
  int getNumGPUs() const {
    return 1;
  }
  c10::DeviceIndex current_device() const {
    return 0;
  }
  c10::DeviceIndex getCurrentDevice() const {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const {
    return 0;
  }
  Device getDeviceFromPtr(void*) const {
    return kCuda;
  }
  c10::Allocator* getPinnedMemoryAllocator() const {
    return c10::GetCPUAllocator();
  }
  c10::Allocator* getCUDADeviceAllocator() const {
    return &memory();
  }
  void deviceSynchronize(c10::DeviceIndex) const {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Clock : c10d::Timer {
  explicit Clock(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    auto first = getTimestamp(start), last = getTimestamp(end);
    return first && last ? std::optional<int64_t>(*last - *first) : std::nullopt;
  }
};

}  // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, Clock)
}

extern "C" {

void pretend_cuda_start() {
  c10::SetAllocator(DeviceType::CUDA, &memory());
  // the default hooks may be in use already: they hold nothing but their table of functions
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}
int64_t pretend_cuda_allocated() {
  return held;
}
int64_t pretend_cuda_peak() {
  return most;
}
void pretend_cuda_reset_peak() {
  most = held.load();
}
void pretend_cuda_doubles(bool supported) {
  doubles = supported;
}
void pretend_cuda_limit(int64_t bytes) {
  limit = bytes;
}
}
