// Every operation of the CUDA dispatch key: refuse what CUDA refuses, and run the CPU's kernel on the same bytes.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/histc.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "tensors.h"

namespace {

std::atomic<bool> doubles{true};

void check_width(at::ScalarType type) {
  TORCH_CHECK_TYPE(
      doubles || (type != at::kDouble && type != at::kComplexDouble),
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 (pretended).");
}

const std::unordered_set<std::string> kAnyDevices = {
    "aten::copy_", "aten::set_", "aten::_copy_from", "aten::_copy_from_and_resize",
};
const std::unordered_set<std::string> kIndicesFromCpu = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index",
    "aten::_unsafe_index_put",
};

const std::unordered_set<std::string> kScalarsFromCpu = {  // beside all that are pointwise
    "aten::fill_", "aten::fill", "aten::masked_fill_", "aten::masked_fill", "aten::index_fill_", "aten::index_fill",
    "aten::where", "aten::floor_divide", "aten::floor_divide_",
};

template <typename Visit>
void each_tensor(const c10::IValue& value, Visit&& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) {
      visit(value.toTensor());
    }
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) {
      each_tensor(item, visit);
    }
  }
}

void check_devices(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  const auto& schema = op.schema();
  if (kAnyDevices.count(schema.name())) {
    return;
  }
  bool scalars = op.hasTag(at::Tag::pointwise) || kScalarsFromCpu.count(schema.name()) > 0 ||
      schema.name().find("_foreach") != std::string::npos;
  bool indices = kIndicesFromCpu.count(schema.name()) > 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool written = alias != nullptr && alias->isWrite();
    each_tensor(arguments[i], [&](const at::Tensor& tensor) {
      bool wrapped = tensor.unsafeGetTensorImpl()->is_wrapped_number();
      bool scalar = tensor.dim() == 0 && (scalars || wrapped) && !written;
      bool index = indices && schema.arguments()[i].name() == "indices";
      TORCH_CHECK(
          tensor.is_cuda() || (tensor.device().is_cpu() && (scalar || index)),
          "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
          tensor.device(), "! (when checking argument ", schema.arguments()[i].name(), " in method ", schema.name(), ")");
    });
  }
}

c10::IValue map_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& item : value.toTensorVector()) {
      list.push_back(change(item));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& item : value.toListRef()) {
      list.push_back(item.isNone() ? std::optional<at::Tensor>() : std::optional<at::Tensor>(change(item.toTensor())));
    }
    return list;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> lists;
    for (const c10::IValue& item : value.toListRef()) {
      lists.push_back(map_tensors(item, change).toTensorList());
    }
    return lists;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) {
    return Device(c10::kCPU);
  }
  return value;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto count = op.schema().arguments().size();
  const auto begin = stack->size() - count;
  check_devices(op, c10::ArrayRef<c10::IValue>(stack->data() + begin, count));
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  for (size_t i = begin; i < stack->size(); ++i) {
    (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& t) { return call.to_cpu(t); });
  }
  op.callBoxed(stack);
  call.written();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    each_tensor((*stack)[i], [](const at::Tensor& t) { check_width(t.scalar_type()); });
  }
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& t) { return call.to_cuda(t); });
  }
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  check_width(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(
      size, &memory(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<Device> device, std::optional<bool> pinned) {
  check_width(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(
      size, stride, &memory(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.dtype() != source.dtype() || self.is_cuda()) {
    check_width(self.scalar_type());  // MPS converts on its own side, also for a CPU that reads
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  call.to_cpu(self).copy_(call.to_cpu(source));
  return self;
}

at::Tensor& set_part(
    at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_whole(at::Tensor& self, c10::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_part(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_as(at::Tensor& self, const at::Tensor& source) {
  return set_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// Half the width in, float32 out, and histograms of integers: CUDA has these kernels, a CPU has not.
template <at::Tensor (*function)(const at::Tensor&, int64_t, bool)>
at::Tensor widened(const at::Tensor& self, int64_t dim, bool half_to_float) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  auto input = call.to_cpu(self);
  return call.to_cuda(function(half_to_float ? input.to(at::kFloat) : input, dim, false));
}

template <at::Tensor (*function)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType)>
at::Tensor narrowed(const at::Tensor& gradient, const at::Tensor& output, int64_t dim, at::ScalarType input) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  auto wide = call.to_cpu(gradient);
  return call.to_cuda(function(wide, call.to_cpu(output), dim, wide.scalar_type()).to(input));
}

at::Tensor histogram(const at::Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  return call.to_cuda(at::histc(call.to_cpu(self).to(at::kDouble), bins, least, most).to(self.scalar_type()));
}

// `storage.resize_` of Python, for the storage that a tensor has.
void resize_storage(const at::Tensor& self, int64_t bytes) {
  auto* impl = self.storage().unsafeGetStorageImpl();
  auto fresh = memory().allocate(bytes);
  std::memcpy(fresh.get(), impl->data(), std::min<size_t>(bytes, impl->nbytes()));
  impl->set_data_ptr_noswap(std::move(fresh));
  impl->set_nbytes(bytes);
}

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // the composite one: the others are operations that a CPU does not have
}

TORCH_LIBRARY(pretend, m) {
  m.def("resize_storage(Tensor self, int bytes) -> ()");
}

TORCH_LIBRARY_IMPL(pretend, CUDA, m) {
  m.impl("resize_storage", resize_storage);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Tensor", set_as);
  m.impl("_softmax", widened<at::_softmax>);
  m.impl("_log_softmax", widened<at::_log_softmax>);
  m.impl("_softmax_backward_data", narrowed<at::_softmax_backward_data>);
  m.impl("_log_softmax_backward_data", narrowed<at::_log_softmax_backward_data>);
  m.impl("histc", histogram);
  m.impl("_fused_sdp_choice", choose_attention);
}

// Collectives of the device's tensors are those of the group's backend for the CPU.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {
           "broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
           "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
           "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_",
           "barrier", "send", "recv_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
}

}  // namespace
