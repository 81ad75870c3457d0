"""What torch.compile makes of the ops on a CPU: which are outside its graphs, and what leaving them costs."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from swamla.ops import gated_delta_rule, l2_normalize, short_conv
from swamla.ops.graphs import outside_graphs
from swamla.ops.rotary import rotate

from .attention_checks import attention, documents

ROWS = ([[70], [70]], [[30, 40], [70]], [[1, 60, 9], [69, 1]], [[10] * 7, [35, 35]])


@outside_graphs
def scaled_by_documents(x_BTD, seq):
    """Its Python depends on where documents lie."""
    assert not torch.compiler.is_compiling()
    return x_BTD / sum(length for _, length in seq.runs)


def delta(x_BTHK, seq):
    gates = x_BTHK.float().mean(-1).sigmoid()
    return gated_delta_rule(*(l2_normalize(x_BTHK),) * 2, x_BTHK, gates.log(), gates, seq=seq)[0]


def rotated(x_BTHK, seq):
    angles = seq.position_BT[..., None, None] * torch.ones(4)
    return rotate(x_BTHK, (angles.cos(), angles.sin()), "half")


OPS = {
    "an op": scaled_by_documents,
    "causal": lambda x, seq: attention()(x, x, x, seq),
    "windowed": lambda x, seq: attention(16, 4)(x, x, x, seq),
    "windowed by sdpa": lambda x, seq: attention(16, 4)(x, x, x, seq, backend="sdpa"),
    "windowed reference": lambda x, seq: attention(16, 4)(x, x, x, seq, backend="reference"),
    "delta": delta,
    "convolution": lambda x, seq: short_conv(x.flatten(2), torch.ones(16, 4), seq=seq).view(x.shape),
    "rotation": rotated,
}


def compiled(function):
    """The compiled function, and how many operations each graph holds that it came to be."""
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend=counted), graphs


def between(x_BTHK, seq, op):
    """What stands before and behind the op is a graph each."""
    return op(x_BTHK.sin().cos(), seq).exp().sin()


@pytest.mark.parametrize("name", OPS)
def test_graphs_end_before_an_op_and_begin_behind_it_whatever_the_documents(name):
    run, graphs = compiled(partial(between, op=OPS[name]))
    counts = []
    for rows in (*ROWS, *ROWS):
        seq = documents(*rows)
        x = torch.randn(2, 70, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        results = [f(x, seq) for f in (run, partial(between, op=OPS[name]))]
        for found, expected in zip(*((y, *torch.autograd.grad(y.sum(), x)) for y in results), strict=True):
            torch.testing.assert_close(found, expected)
        counts.append(len(graphs))
    assert counts[0] >= 2
    assert counts[1:] == counts[1:2] * 7  # rows that are one document may differ from packed ones


def test_an_op_outside_graphs_is_itself_where_nothing_is_compiled_and_loads_no_compiler():
    code = """
import sys, torch
from swamla.ops import causal_attention, gated_delta_rule, short_conv
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout
x, seq = torch.ones(1, 40, 2, 8), Layout.one_document_per_row(1, 40)
causal_attention(x, x, x, seq)
gated_delta_rule(x, x, x, -x[..., 0], x[..., 0], seq=seq)
short_conv(x.flatten(2), torch.ones(16, 4), seq=seq)
assert outside_graphs(max)(1, 2) == 2
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
