// The `skink_cpp::` ops on PyTorch's stable ABI: checks arguments, allocates results, hands raw pointers to the
// kernels.
//
// Only torch/csrc/stable and torch/headeronly may be included, so that one build serves every PyTorch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

struct Shape {
    const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, Shape shape) {
    out << '[';
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i == 0 ? "" : ", ") << shape.tensor.size(i);
    return out << ']';
}

skink::Dtype dtype_of(const Tensor& tensor, const char* op) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return skink::Dtype::float32;
        case ScalarType::BFloat16:
            return skink::Dtype::bfloat16;
        case ScalarType::Half:
            return skink::Dtype::float16;
        default:
            require(false, op, ": dtype must be float32, bfloat16 or float16, got ",
                    torch::headeronly::toString(tensor.scalar_type()));
            return skink::Dtype::float32;
    }
}

void require_same(const Tensor& a, const Tensor& b, const char* op, const char* name) {
    require(b.is_cpu(), op, ": ", name, " must be on the cpu");
    require(a.scalar_type() == b.scalar_type(), op, ": ", name, " must be of the dtype of the first argument, ",
            torch::headeronly::toString(a.scalar_type()), ", got ", torch::headeronly::toString(b.scalar_type()));
}

Tensor with_dense_rows(const Tensor& tensor) {
    const bool dense = tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
    return dense ? tensor : torch::stable::contiguous(tensor);
}

int64_t batch_stride(const Tensor& tensor) { return tensor.size(0) == 1 ? 0 : tensor.stride(0); }

// PyTorch's own threads.
skink::Pool pool() {
    const auto run = [](int workers, void (*body)(void*, int), void* context) {
        torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int>(worker));
        });
    };
    return {static_cast<int>(torch::stable::get_num_threads()), run};
}

Tensor rms_norm(Tensor input, std::optional<Tensor> weight, double eps, double offset) {
    skink::RmsNorm problem{};
    problem.dtype = problem.weight_dtype = dtype_of(input, "rms_norm");
    require(input.dim() >= 1, "rms_norm: input must have at least one dimension");
    const int64_t width = input.size(input.dim() - 1);
    if (weight) {
        require(weight->is_cpu(), "rms_norm: weight must be on the cpu");
        require(weight->dim() == 1 && weight->size(0) == width, "rms_norm: weight must be [", width, "], got ",
                Shape{*weight});
        problem.weight_dtype = dtype_of(*weight, "rms_norm");
        require(problem.weight_dtype == problem.dtype || problem.weight_dtype == skink::Dtype::float32,
                "rms_norm: weight must be of the input's dtype or float32, got ",
                torch::headeronly::toString(weight->scalar_type()));
        weight = torch::stable::contiguous(*weight);
        problem.weight = weight->const_data_ptr();
    }
    // Rows a constant distance apart need no copy; anything else does.
    const bool matrix = input.dim() == 2 && (width <= 1 || input.stride(1) == 1);
    const Tensor rows = matrix ? input : torch::stable::contiguous(input);
    Tensor output = torch::stable::new_empty(input, input.sizes());
    if (input.numel() == 0) return output;
    problem.input = rows.const_data_ptr();
    problem.output = output.mutable_data_ptr();
    problem.rows = input.numel() / width;
    problem.width = width;
    problem.input_stride = matrix ? rows.stride(0) : width;
    problem.eps = static_cast<float>(eps);
    problem.offset = static_cast<float>(offset);
    skink::kernels().rms_norm(problem, pool());
    return output;
}

Tensor rotary(Tensor input, Tensor cosine, Tensor sine, bool interleaved) {
    skink::Rotary problem{};
    problem.dtype = dtype_of(input, "rotary");
    problem.interleaved = interleaved;
    require(input.dim() == 4, "rotary: input must be [B, H, T, D], got ", Shape{input});
    const int64_t batch = input.size(0), tokens = input.size(2), width = input.size(3);
    const auto table = [&](const Tensor& tensor, const char* name) {
        require(tensor.is_cpu(), "rotary: ", name, " must be on the cpu");
        require(tensor.dim() == 3 && (tensor.size(0) == batch || tensor.size(0) == 1) && tensor.size(1) == tokens &&
                    tensor.size(2) % 2 == 0 && tensor.size(2) <= width,
                "rotary: ", name, " must be [B or 1, T, R] with R even and at most D, for input ", Shape{input},
                " got ", Shape{tensor});
        const bool same = tensor.scalar_type() == input.scalar_type();
        return with_dense_rows(same ? tensor : torch::stable::to(tensor, input.scalar_type()));
    };
    cosine = table(cosine, "cos");
    sine = table(sine, "sin");
    require(cosine.size(2) == sine.size(2), "rotary: cos and sin must have one width, got ", Shape{cosine}, " and ",
            Shape{sine});
    input = with_dense_rows(input);
    Tensor output = torch::stable::new_empty(input, input.sizes());
    if (input.numel() == 0) return output;
    problem.input = input.const_data_ptr();
    problem.cosine = cosine.const_data_ptr();
    problem.sine = sine.const_data_ptr();
    problem.output = output.mutable_data_ptr();
    problem.batch = batch;
    problem.heads = input.size(1);
    problem.tokens = tokens;
    problem.width = width;
    problem.rotated = cosine.size(2);
    problem.input_batch = input.stride(0);
    problem.input_head = input.stride(1);
    problem.input_token = input.stride(2);
    problem.cosine_batch = batch_stride(cosine);
    problem.cosine_token = cosine.stride(1);
    problem.sine_batch = batch_stride(sine);
    problem.sine_token = sine.stride(1);
    skink::kernels().rotary(problem, pool());
    return output;
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, Free>;

// Whole cache lines, and never none.
Scratch new_scratch(size_t bytes) {
    Scratch scratch(std::aligned_alloc(64, (bytes / 64 + 1) * 64));
    if (scratch == nullptr) throw std::bad_alloc();
    return scratch;
}

template <typename Problem>
void run_with_scratch(const Problem& problem, void (*kernel)(const Problem&, const skink::Pool&, void*),
                      size_t (*scratch_bytes)(const Problem&, const skink::Pool&)) {
    const skink::Pool threads = pool();
    const Scratch scratch = new_scratch(scratch_bytes(problem, threads));
    kernel(problem, threads, scratch.get());
}

// The input of a layer as rows, copied only where they are not a constant distance apart.
Tensor as_rows(const Tensor& input) {
    const bool matrix = input.dim() == 2 && (input.size(1) <= 1 || input.stride(1) == 1);
    return matrix || input.is_contiguous() ? input : torch::stable::contiguous(input);
}

// An empty result of a layer: the input's shape with `outputs` in place of its width.
Tensor new_outputs(const Tensor& input, int64_t outputs) {
    std::vector<int64_t> shape(input.dim(), outputs);
    for (int64_t i = 0; i + 1 < input.dim(); ++i) shape[i] = input.size(i);
    return torch::stable::new_empty(input, {shape.data(), shape.size()});
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> key_mask, bool causal, double scale,
                 int64_t window, double softcap, std::optional<Tensor> sinks, std::optional<Tensor> alibi) {
    skink::Attention problem{};
    problem.dtype = dtype_of(query, "attention");
    require_same(query, key, "attention", "key");
    require_same(query, value, "attention", "value");
    require(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
            "attention: query, key and value must be [B, H, T, D], [B, Hk, S, D] and [B, Hk, S, Dv], got ",
            Shape{query}, ", ", Shape{key}, " and ", Shape{value});
    const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), width = query.size(3);
    const int64_t key_heads = key.size(1), keys = key.size(2), value_width = value.size(3);
    require(key.size(0) == batch && value.size(0) == batch && key.size(3) == width && value.size(1) == key_heads &&
                value.size(2) == keys,
            "attention: key must be [B, Hk, S, D] and value [B, Hk, S, Dv] for query ", Shape{query}, ", got ",
            Shape{key}, " and ", Shape{value});
    require(key_heads > 0 ? heads % key_heads == 0 : heads == 0, "attention: the ", key_heads,
            " key heads must divide the ", heads, " query heads");
    require(keys >= tokens, "attention: the queries are the last of the keys' positions, so there must be at least ",
            tokens, " keys, got ", keys);
    require(window >= 0, "attention: window must be 0 (none) or positive, got ", window);
    require(softcap >= 0, "attention: softcap must be 0 (none) or positive, got ", softcap);
    if (key_mask) {
        require(key_mask->is_cpu(), "attention: key_mask must be on the cpu");
        require(key_mask->scalar_type() == ScalarType::Bool && key_mask->dim() == 2 && key_mask->size(0) == batch &&
                    key_mask->size(1) >= keys,
                "attention: key_mask must be bool[B, M] with B = ", batch, " and M >= ", keys, ", got ",
                torch::headeronly::toString(key_mask->scalar_type()), Shape{*key_mask});
        key_mask = with_dense_rows(*key_mask);
    }
    const auto by_head = [&](std::optional<Tensor>& tensor, const char* name) {
        if (!tensor) return;
        require(tensor->is_cpu(), "attention: ", name, " must be on the cpu");
        require(tensor->dim() == 1 && tensor->size(0) == heads, "attention: ", name, " must be [", heads, "], got ",
                Shape{*tensor});
        tensor = torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
    };
    by_head(sinks, "sinks");
    by_head(alibi, "alibi");
    query = with_dense_rows(query);
    key = with_dense_rows(key);
    value = with_dense_rows(value);
    const int64_t shape[] = {batch, heads, tokens, value_width};
    Tensor output = torch::stable::new_empty(query, {shape, 4});
    if (output.numel() == 0) return output;
    problem.query = query.const_data_ptr();
    problem.key = key.const_data_ptr();
    problem.value = value.const_data_ptr();
    problem.output = output.mutable_data_ptr();
    if (key_mask) {
        // The mask may cover more of the past than the keys do: its tail lines up with them.
        problem.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr()) + (key_mask->size(1) - keys);
        problem.mask_batch = key_mask->stride(0);
    }
    if (sinks) problem.sinks = static_cast<const float*>(sinks->const_data_ptr());
    if (alibi) problem.alibi = static_cast<const float*>(alibi->const_data_ptr());
    problem.batch = batch;
    problem.heads = heads;
    problem.key_heads = key_heads;
    problem.tokens = tokens;
    problem.keys = keys;
    problem.width = width;
    problem.value_width = value_width;
    problem.query_batch = query.stride(0);
    problem.query_head = query.stride(1);
    problem.query_token = query.stride(2);
    problem.key_batch = key.stride(0);
    problem.key_head = key.stride(1);
    problem.key_token = key.stride(2);
    problem.value_batch = value.stride(0);
    problem.value_head = value.stride(1);
    problem.value_token = value.stride(2);
    problem.causal = causal;
    problem.window = window;
    problem.scale = static_cast<float>(scale);
    problem.softcap = static_cast<float>(softcap);
    run_with_scratch(problem, skink::kernels().attention, skink::kernels().attention_scratch);
    return output;
}

Tensor low_rank_linear(Tensor input, Tensor down, Tensor up, std::optional<Tensor> bias) {
    skink::LowRankLinear problem{};
    problem.dtype = dtype_of(input, "low_rank_linear");
    require_same(input, down, "low_rank_linear", "down");
    require_same(input, up, "low_rank_linear", "up");
    require(input.dim() >= 1, "low_rank_linear: input must have at least one dimension");
    const int64_t width = input.size(input.dim() - 1);
    require(down.dim() == 2 && up.dim() == 2 && down.size(1) == width && up.size(1) == down.size(0),
            "low_rank_linear: down must be [R, ", width, "] and up [O, R] for input ", Shape{input}, ", got ",
            Shape{down}, " and ", Shape{up});
    const int64_t outputs = up.size(0);
    if (bias) {
        require_same(input, *bias, "low_rank_linear", "bias");
        require(bias->dim() == 1 && bias->size(0) == outputs, "low_rank_linear: bias must be [", outputs, "], got ",
                Shape{*bias});
        bias = torch::stable::contiguous(*bias);
        problem.bias = bias->const_data_ptr();
    }
    const Tensor rows = as_rows(input);
    down = with_dense_rows(down);
    up = with_dense_rows(up);
    Tensor output = new_outputs(input, outputs);
    if (output.numel() == 0) return output;
    problem.tokens = output.numel() / outputs;
    problem.input = rows.const_data_ptr();
    problem.down = down.const_data_ptr();
    problem.up = up.const_data_ptr();
    problem.output = output.mutable_data_ptr();
    problem.width = width;
    problem.rank = down.size(0);
    problem.outputs = outputs;
    problem.input_stride = rows.dim() == 2 ? rows.stride(0) : width;
    problem.down_stride = down.stride(0);
    problem.up_stride = up.stride(0);
    run_with_scratch(problem, skink::kernels().low_rank_linear, skink::kernels().low_rank_linear_scratch);
    return output;
}

Tensor pivoted_linear(Tensor input, Tensor kept, Tensor rest, std::optional<Tensor> kept_bias,
                      std::optional<Tensor> rest_bias, std::optional<Tensor> order) {
    skink::PivotedLinear problem{};
    problem.dtype = dtype_of(input, "pivoted_linear");
    require_same(input, kept, "pivoted_linear", "kept");
    require_same(input, rest, "pivoted_linear", "rest");
    require(input.dim() >= 1, "pivoted_linear: input must have at least one dimension");
    const int64_t width = input.size(input.dim() - 1);
    require(kept.dim() == 2 && rest.dim() == 2 && kept.size(1) == width && rest.size(1) == kept.size(0),
            "pivoted_linear: kept must be [R, ", width, "] and rest [S, R] for input ", Shape{input}, ", got ",
            Shape{kept}, " and ", Shape{rest});
    const int64_t rank = kept.size(0), others = rest.size(0);
    const auto as_bias = [&](std::optional<Tensor>& bias, int64_t size, const char* name) -> const void* {
        if (!bias) return nullptr;
        require_same(input, *bias, "pivoted_linear", name);
        require(bias->dim() == 1 && bias->size(0) == size, "pivoted_linear: ", name, " must be [", size, "], got ",
                Shape{*bias});
        bias = torch::stable::contiguous(*bias);
        return bias->const_data_ptr();
    };
    problem.kept_bias = as_bias(kept_bias, rank, "kept_bias");
    problem.rest_bias = as_bias(rest_bias, others, "rest_bias");
    int64_t outputs = rank + others;
    if (order) {
        require(order->is_cpu() && order->scalar_type() == ScalarType::Long && order->dim() == 1,
                "pivoted_linear: order must be int64[N] on the cpu, got ",
                torch::headeronly::toString(order->scalar_type()), Shape{*order});
        order = torch::stable::contiguous(*order);
        problem.order = static_cast<const int64_t*>(order->const_data_ptr());
        uint64_t outside = 0;  // its highest bit is set once a number is negative or too large
        for (int64_t i = 0; i < order->size(0); ++i) {
            const auto place = static_cast<uint64_t>(problem.order[i]);
            outside |= place | (static_cast<uint64_t>(outputs - 1) - place);
        }
        require(outside >> 63 == 0, "pivoted_linear: order must hold numbers from 0 to ", outputs - 1);
        outputs = order->size(0);
    }
    const Tensor rows = as_rows(input);
    kept = with_dense_rows(kept);
    rest = with_dense_rows(rest);
    Tensor output = new_outputs(input, outputs);
    if (output.numel() == 0) return output;
    problem.tokens = output.numel() / outputs;
    problem.input = rows.const_data_ptr();
    problem.kept = kept.const_data_ptr();
    problem.rest = rest.const_data_ptr();
    problem.output = output.mutable_data_ptr();
    problem.width = width;
    problem.rank = rank;
    problem.others = others;
    problem.outputs = outputs;
    problem.input_stride = rows.dim() == 2 ? rows.stride(0) : width;
    problem.kept_stride = kept.stride(0);
    problem.rest_stride = rest.stride(0);
    run_with_scratch(problem, skink::kernels().pivoted_linear, skink::kernels().pivoted_linear_scratch);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY(skink_cpp, m) {
    m.def("rms_norm(Tensor input, Tensor? weight, float eps, float offset=0.0) -> Tensor");
    m.def("rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor");
    m.def(
        "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask=None, *, bool causal=True, float scale, "
        "int window=0, float softcap=0.0, Tensor? sinks=None, Tensor? alibi=None) -> Tensor");
    m.def("low_rank_linear(Tensor input, Tensor down, Tensor up, Tensor? bias=None) -> Tensor");
    m.def(
        "pivoted_linear(Tensor input, Tensor kept, Tensor rest, Tensor? kept_bias=None, Tensor? rest_bias=None, "
        "Tensor? order=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(skink_cpp, CPU, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("rotary", TORCH_BOX(&rotary));
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear));
    m.impl("pivoted_linear", TORCH_BOX(&pivoted_linear));
}
