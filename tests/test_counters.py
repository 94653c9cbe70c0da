"""The counters count planted costs exactly: what they report is what happened."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastflow.ops import grouped_conv
from fastflow.ops.interpolate import interpolate
from fastflow.testing.counters import Counts, SavedTensors, count_cuda_syncs, current_module


def test_compute_ops_are_counted_by_name():
    x = torch.ones(2, 3)
    with Counts() as counts:
        ((x + 1) * 2 + 3).sum()
    assert counts.ops == {"aten::add": 2, "aten::mul": 1, "aten::sum": 1}


def test_views_allocation_and_metadata_are_not_compute():
    x = torch.ones(2, 3)
    with Counts() as counts:
        x.view(3, 2).t().unsqueeze(0).expand(4, 2, 3).detach()[:, 1:].squeeze()
        torch.empty(5), torch.empty_like(x), x.new_empty(7)
        x.chunk(3, 1), x.split(1), x.shape, x.stride(), x.reshape(6), x.contiguous()
    assert not counts.ops
    assert not counts.syncs


def test_a_reshape_that_copies_is_compute():
    with Counts() as counts:
        torch.ones(2, 3).t().reshape(6)
    assert counts.ops == {"aten::ones": 1, "aten::clone": 1}


def test_the_backward_pass_counts():
    x = torch.ones(3, requires_grad=True)
    with Counts() as forward:
        y = x.exp()
    with Counts() as backward:
        y.backward(torch.ones(3))
    assert forward.ops == {"aten::exp": 1}
    assert backward.ops["aten::mul"] == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_composite_ops_count_as_their_parts_in_every_grad_mode(mode):
    x, weight, bias = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)
    with mode(), Counts() as counts:
        F.linear(x, weight, bias)
    assert counts.ops == {"aten::addmm": 1}


def test_a_fused_op_counts_once(kernel_backend, device):
    x = torch.randn(1, 8, 2, device=device, requires_grad=True)
    with Counts() as counts:
        interpolate(x, [(8, 12)], backend=kernel_backend).backward(torch.ones(1, 12, 2, device=device))
    fused = {name: count for name, count in counts.ops.items() if name.startswith("fastflow::")}
    assert sorted(fused.values()) == [1, 1]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: int(x[0]), "aten::_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "aten::_local_scalar_dense"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 1], "aten::index"),
        (lambda x: x.masked_select(x > 1), "aten::masked_select"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: torch.equal(x, x), "aten::equal"),
        (lambda x: x.tolist(), "Tensor.tolist"),
        (lambda x: x.numpy(), "Tensor.numpy"),
        (lambda x: np.asarray(x), "Tensor.__array__"),
    ],
    ids=["item", "int", "bool", "nonzero", "x[mask]", "masked_select", "unique", "equal", "tolist", "numpy", "asarray"],
)
def test_a_planted_host_sync_is_counted_once(read, name):
    x = torch.arange(4.0)
    with Counts() as counts:
        read(x)
    assert counts.syncs == {name: 1}


def test_assigning_rows_by_mask_syncs_but_filling_with_a_number_does_not():
    x = torch.arange(4.0)
    with Counts() as counts:
        x[x > 2] = 0.0
    assert not counts.syncs
    with Counts() as counts:
        x[x < 2] = torch.ones(3)
    assert counts.syncs == {"aten::index_put_": 1}


def test_device_work_without_reading_has_no_sync():
    with Counts() as counts:
        x = torch.randn(4, 4, requires_grad=True)
        torch.where(x > 0, x, -x).gather(1, torch.zeros(4, 1, dtype=torch.int64)).sum().backward()
    assert not counts.syncs


def test_counting_changes_no_result():
    x = torch.randn(3, 5)
    with Counts():
        counted = F.layer_norm(x, (5,)).softmax(-1)
    assert torch.equal(counted, F.layer_norm(x, (5,)).softmax(-1))


def test_flops_of_a_linear_a_convolution_and_attention():
    with Counts() as counts:
        F.linear(torch.ones(5, 4), torch.ones(3, 4))
    assert counts.flops.total() == 2 * 5 * 4 * 3
    with Counts() as counts:
        F.conv1d(torch.ones(2, 4, 9), torch.ones(6, 2, 3), groups=2)
    assert counts.flops.total() == 2 * 2 * 7 * 6 * 2 * 3
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    with Counts() as forward:
        out = F.scaled_dot_product_attention(q, q, q)
    assert forward.flops.total() == 2 * (2 * 2 * 3 * 5 * 5 * 8)
    with Counts() as backward:
        out.sum().backward()
    assert backward.flops.total() == 2.5 * forward.flops.total()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("convolve", [F.conv1d, F.conv_transpose1d])
def test_a_convolution_takes_as_much_again_for_each_gradient(convolve, groups):
    x, weight = torch.randn(2, 4, 9, requires_grad=True), torch.randn(4, 4 // groups, 3, requires_grad=True)
    with Counts() as forward:
        out = convolve(x, weight, groups=groups)
    for wanted in ([x], [weight], [x, weight]):
        with Counts() as backward:
            torch.autograd.grad(out.sum(), wanted, retain_graph=True)
        assert backward.flops.total() == len(wanted) * forward.flops.total()


def test_flops_of_a_grouped_conv_are_those_of_the_reference():
    x, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(12, 4, 5, requires_grad=True)
    totals = []
    for backend in ("reference", "cpu"):
        with Counts() as counts:
            grouped_conv(x, weight, None, groups=2, backend=backend).sum().backward()
        totals.append(counts.flops.total())
    assert totals[0] == totals[1] == 3 * 2 * (2 * 9) * 12 * 4 * 5


def test_saved_bytes_are_those_the_backward_needs():
    x = torch.ones(10, requires_grad=True)
    with SavedTensors() as saved:
        x.exp()  # saves its output
    assert saved.bytes == 40
    with SavedTensors() as saved:
        x + 1  # saves nothing
    assert saved.bytes == 0
    with SavedTensors() as saved, torch.no_grad():
        x.exp()
    assert saved.bytes == 0


def test_a_storage_saved_twice_counts_once_and_in_full():
    x = torch.ones(10, requires_grad=True)
    with SavedTensors() as saved:
        y = x.exp()
        y[:5].sin(), y[5:].cos(), y.view(2, 5).exp().sum()
    # exp's output, of which sin and cos save views, and the second exp's output
    assert saved.bytes == 40 + 40


def test_what_the_backward_pass_saves_while_it_computes_again_does_not_count():
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp().sin()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(x.exp().sin(), x, grad)[0]

    with SavedTensors() as saved:
        Again.apply(torch.ones(10, requires_grad=True)).sum().backward()
    assert saved.bytes == 40  # x


def test_a_small_view_keeps_its_whole_storage():
    x = torch.ones(10, requires_grad=True)
    with SavedTensors() as saved:
        (x * 2)[:3].sin()
    assert saved.bytes == 40


def test_parameters_are_not_saved_bytes():
    linear = nn.Linear(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    with SavedTensors(linear.parameters()) as saved:
        linear(x)
    assert saved.bytes == 2 * 4 * 4  # the input
    with SavedTensors([*linear.parameters(), x]) as saved:
        linear(x)
    assert saved.bytes == 0


def test_saved_for_backward_of_a_custom_function_counts():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.new_zeros(7))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    with SavedTensors() as saved:
        Keep.apply(torch.ones(3, requires_grad=True))
    assert saved.bytes == 28


def test_gradients_are_right_while_saving_is_counted():
    x = torch.ones(3, requires_grad=True)
    with SavedTensors():
        y = x.exp().sum()
    y.backward()
    assert torch.equal(x.grad, x.exp())


def test_costs_are_booked_on_the_innermost_running_module():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()))
    with (
        current_module(model) as where,
        SavedTensors(model.parameters(), where) as saved,
        Counts(where) as counts,
    ):
        model(torch.ones(2, 4)).sum()
    assert counts.flops == {"0": 2 * 2 * 4 * 6, "1.0": 2 * 2 * 6 * 6}
    assert saved.by_name == {"0": 2 * 4 * 4, "1.0": 2 * 6 * 4, "1.1": 2 * 6 * 4}
    assert where() == ""
    assert not model._forward_hooks


def test_the_module_stack_survives_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("planted")

    model = nn.Sequential(nn.Identity(), Broken())
    with current_module(model) as where:
        with pytest.raises(RuntimeError, match="planted"):
            model(torch.ones(1))
        assert where() == ""


def test_count_cuda_syncs_says_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        count_cuda_syncs(lambda: None)


def test_count_cuda_syncs_counts_a_planted_sync():
    if not torch.cuda.is_available():
        pytest.skip("not run: this machine has no GPU")
    x = torch.ones(3, device="cuda")
    assert count_cuda_syncs(lambda: x + 1) == 0
    assert count_cuda_syncs(lambda: [x.sum().item(), x.sum().item()]) == 2


def test_bytes_are_those_of_the_tensors_that_an_operator_reads_and_writes():
    a, b = torch.randn(3, 5), torch.randn(5, 7, dtype=torch.float64).float()
    with Counts() as counts:
        product = a @ b
        product.t().add_(product.t())
    assert counts.bytes == {"aten::mm": 4 * (15 + 35 + 21), "aten::add_": 4 * 2 * 21}
