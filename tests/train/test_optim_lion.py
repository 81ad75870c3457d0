"""Lion takes the steps of the paper's box, and the steps computed by hand."""

import pytest
import torch
from torch import nn

from swamla.errors import ConfigError
from swamla.train.optim import Lion, LionConfig


def algorithm_2(theta, gradients, *, lr, decay, beta1, beta2):
    """Algorithm 2 of arXiv 2302.06675, line by line, in float64."""
    theta, m = theta.double(), torch.zeros_like(theta, dtype=torch.float64)
    for g in (g.double() for g in gradients):
        c = beta1 * m + (1 - beta1) * g
        theta = theta - lr * (c.sign() + decay * theta)
        m = beta2 * m + (1 - beta2) * g
    return theta, m


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)])
def test_lion_takes_the_steps_of_the_papers_box(betas):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=generator) for s in [(33, 17), (5,), (3, 8, 9)]]
    gradients = [[torch.randn(t.shape, generator=generator) for _ in range(20)] for t in starts]
    params = [nn.Parameter(t.clone()) for t in starts]
    lion = Lion([{"params": params, "weight_decay": 0.3}], lr=1e-2, betas=betas, moments="fp32")
    for step in range(20):
        for p, found in zip(params, gradients, strict=True):
            p.grad = found[step]
        lion.step()
    for p, start, found in zip(params, starts, gradients, strict=True):
        theta, m = algorithm_2(start, found, lr=1e-2, decay=0.3, beta1=betas[0], beta2=betas[1])
        torch.testing.assert_close(p.double(), theta, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lion.state[p]["exp_avg"].double(), m, atol=1e-6, rtol=1e-6)


def test_lion_gives_the_values_computed_by_hand():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    lion = Lion([{"params": [p], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.99), moments="fp32")
    p.grad = torch.tensor([4.0, -1e-6, 0.0])
    lion.step()  # decayed by 0.95, then moved by 0.1 against the sign; a gradient of zero has none
    torch.testing.assert_close(p.detach(), torch.tensor([0.85, -1.8, 0.475]))
    torch.testing.assert_close(lion.state[p]["exp_avg"], torch.tensor([0.04, -1e-8, 0.0]))
    p.grad = torch.tensor([-0.3, -1.0, 1.0])
    lion.step()  # the first: 0.9·0.04 − 0.1·0.3 > 0, the moment outweighs the gradient
    torch.testing.assert_close(p.detach(), torch.tensor([0.7075, -1.61, 0.35125]))
    torch.testing.assert_close(lion.state[p]["exp_avg"], torch.tensor([0.0366, -0.0100000099, 0.01]))


@pytest.mark.parametrize("betas", [(1.0, 0.99), (0.9, 1.0), (-0.1, 0.99)])
def test_betas_that_do_not_decay_are_refused(betas):
    with pytest.raises(ConfigError, match=r"betas = .*: must each be at least 0 and below 1, e\.g\. 0\.9, 0\.99"):
        LionConfig(betas=betas)
