// Memory of the pretended device, and tensors that lie in it and on the CPU at once.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

const Device kCuda(DeviceType::CUDA, 0);

std::atomic<int64_t> held{0}, most{0}, limit{INT64_MAX};

void hold(int64_t bytes) {
  int64_t now = held += bytes, before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {
  }
}

// What a DataPtr of the device owns: memory of the CPU's allocator, or the storage of a CPU's result.
struct Block {
  c10::DataPtr data;
  c10::Storage storage;
  int64_t bytes = 0;
  ~Block() {
    held -= bytes;
  }
};

c10::DataPtr own(std::unique_ptr<Block> block, void* data, size_t bytes) {
  TORCH_CHECK_WITH(
      OutOfMemoryError, held + static_cast<int64_t>(bytes) <= limit, "CUDA out of memory (pretended). Tried to allocate ",
      bytes, " bytes beside ", held.load());
  block->bytes = static_cast<int64_t>(bytes);
  hold(block->bytes);
  return {data, block.release(), [](void* p) { delete static_cast<Block*>(p); }, kCuda};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>();
    block->data = c10::GetCPUAllocator()->allocate(bytes);
    void* data = block->data.get();
    return own(std::move(block), data, bytes);
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Memory& memory() {
  static auto* one = new Memory;  // outlives every tensor
  return *one;
}

c10::DataPtr taken(const c10::Storage& storage) {
  auto block = std::make_unique<Block>();
  block->storage = storage;
  return own(std::move(block), const_cast<void*>(storage.data()), storage.nbytes());
}

at::Tensor with_shape_of(c10::Storage storage, DispatchKey key, const at::Tensor& other) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), other.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  made._set_conj(other.is_conj());
  made._set_neg(other.is_neg());
  if (other.unsafeGetTensorImpl()->is_wrapped_number()) {
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return made;
}

c10::Storage cpu_view(const c10::Storage& storage) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(
      const_cast<void*>(storage.data()), kept, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::kCPU);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true};
}

// Operands of one call: CPU tensors that share the bytes of the device's, and the way back.
struct Call {
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;  // of the device, of the CPU
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      return tensor;
    }
    for (auto& [device, cpu] : tensors) {
      if (device.is_same(tensor)) {
        return cpu;
      }
    }
    const auto& storage = tensor.storage();
    c10::Storage seen;
    for (auto& [device, cpu] : storages) {
      if (device.is_alias_of(storage)) {
        seen = cpu;
      }
    }
    if (!seen) {
      seen = cpu_view(storage);
      storages.emplace_back(storage, seen);
    }
    tensors.emplace_back(tensor, with_shape_of(seen, DispatchKey::CPU, tensor));
    return tensors.back().second;
  }

  at::Tensor to_cuda(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) {
      return tensor;
    }
    for (auto& [device, cpu] : tensors) {
      if (cpu.is_same(tensor)) {
        return device;
      }
    }
    for (auto& [device, cpu] : storages) {
      if (cpu.is_alias_of(tensor.storage())) {
        return with_shape_of(device, DispatchKey::CUDA, tensor);
      }
    }
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), taken(tensor.storage()), &memory(), true);
    return with_shape_of(std::move(storage), DispatchKey::CUDA, tensor);
  }

  // Outputs given by the caller may have got other sizes, and other memory with them.
  void written() {
    for (auto& [device, cpu] : storages) {
      if (device.data() != cpu.data() || device.nbytes() != cpu.nbytes()) {
        auto* impl = device.unsafeGetStorageImpl();
        impl->set_data_ptr_noswap(taken(cpu));
        impl->set_nbytes(cpu.nbytes());
      }
    }
    for (auto& [device, cpu] : tensors) {
      if (device.sizes() != cpu.sizes() || device.strides() != cpu.strides() ||
          device.storage_offset() != cpu.storage_offset()) {
        device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }
};

}  // namespace
