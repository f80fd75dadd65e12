from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fusecli
from fusecli import ImageTextFusion
from fusecli.errors import ValuesError
from tests.oracle import Article, assert_as_good, features


def _pair(m: int, n: int, image_dim: int, text_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(m)
    return torch.from_numpy(features(rng, m, image_dim)), torch.from_numpy(features(rng, n, text_dim))


@pytest.mark.parametrize("m", [1, 5])
def test_it_is_the_articles_module(m: int) -> None:
    torch.manual_seed(3)
    theirs = Article(32, 4)
    torch.manual_seed(3)
    ours = ImageTextFusion(32, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
    image, text = _pair(m, 7, 32, 32)
    torch.testing.assert_close(ours(image, text), theirs(image, text)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [1, 5, 200])
def test_numbers_and_gradients_are_the_articles(m: int) -> None:
    theirs = Article(32, 4, 24, 40)
    torch.nn.init.normal_(theirs.attention.in_proj_bias)
    ours = ImageTextFusion(32, 4, text_dim=24, image_dim=40)
    ours.load_state_dict(theirs.state_dict())
    image, text = _pair(m, 7, 40, 24)
    fused, expected = ours(image, text), theirs(image, text)[0]
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
    fused.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [1, 3, 9])
def test_gradcheck(m: int) -> None:
    module = ImageTextFusion(8, 2, text_dim=6, image_dim=5).double()
    image = torch.randn(m, 5, dtype=torch.float64, requires_grad=True)
    text = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda image, text, *_: module(image, text), (image, text, *parameters))


def test_a_peaked_softmax_with_gradients_is_as_good_as_the_articles() -> None:
    torch.manual_seed(478)
    module = ImageTextFusion(96, 12, image_dim=64)
    image, text = torch.randn(577, 64), torch.randn(1, 96)
    image *= 90 / image.norm(dim=1, keepdim=True)
    text *= 90 / text.norm(dim=1, keepdim=True)

    def reference(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        query, key = module.text_proj(text).unsqueeze(1), module.image_proj(image).unsqueeze(1)
        fused: torch.Tensor = module.attention(query, key, key)[0]  # as the article calls it
        return fused.squeeze(1).detach()

    fused, single = module(image, text).detach(), reference(image, text)
    module.double()
    assert_as_good(fused, reference(image.double(), text.double()).numpy(), single.numpy())


@pytest.mark.parametrize("side", [0, 1])
def test_integers_are_no_features(side: int) -> None:
    pair = list(_pair(3, 4, 16, 16))
    pair[side] = pair[side].long()
    with pytest.raises(ValuesError, match="int64"):
        ImageTextFusion(16, 4)(*pair)


def test_projections_may_be_one_layer() -> None:
    module = ImageTextFusion(16, 4)
    module.text_proj = module.image_proj
    image, text = _pair(3, 4, 16, 16)
    weights = fusecli.Weights(fusecli.Config(num_heads=4), {k: v.numpy() for k, v in module.state_dict().items()})
    torch.testing.assert_close(module(image, text).detach(), fusecli.fuse(weights, image, text), rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = ImageTextFusion(16, 2)
    image, text = _pair(4, 6, 16, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(image, text) - text).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.65, -2.8])  # exp of the scores, times 2, is beyond float16; and it is below
def test_half_precision_gives_the_same_with_and_without_gradients(dtype: torch.dtype, scale: float) -> None:
    module = ImageTextFusion(8, 1)
    weights = fusecli.identity(8, 1)
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()})
    module.to(dtype)
    image = 2 + torch.arange(16).reshape(2, 8).div(64).to(dtype)
    text = torch.full((3, 8), scale, dtype=dtype)
    with torch.no_grad():
        fused = module(image, text)
    expected = fusecli.fuse(weights, image.float(), text.float())
    torch.testing.assert_close(fused.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(fused, module(image, text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_image_row_moves_no_weight_of_the_text(dtype: torch.dtype) -> None:
    module = ImageTextFusion(64, 4).to(dtype)
    image, text = (x.to(dtype) for x in _pair(1, 20, 64, 64))
    module(image, text).square().sum().backward()
    for name in ("text_proj.weight", "text_proj.bias"):
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        assert not gradient.any()


def _without_bias(module: Any) -> None:
    module.text_proj.bias = None


def _with_another_layer(module: Any) -> None:
    module.image_proj = torch.nn.Sequential(module.image_proj, torch.nn.Identity())


def _with_normed_weights(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.text_proj)


def _as_a_replica(module: Any) -> None:
    """As `torch.nn.DataParallel` makes them: tensors that are parameters no more."""
    for layer in (*module.children(), module.attention.out_proj):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            del layer._parameters[name]
            setattr(layer, name, parameter.detach().clone())


def _with_dropout(module: Any) -> None:
    module.attention.dropout = 0.5


def _with_keys_of_its_own(module: Any) -> None:
    torch.manual_seed(1)
    module.attention = torch.nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)


def _with_a_hook(module: Any) -> None:
    module.attention.register_forward_hook(lambda _, given, result: (result[0] + 1, result[1]))


class _Twice(torch.nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, *given: Any, **options: Any) -> Any:
        fused, weights = self.inner(*given, **options)
        return 2 * fused, weights


def _wrapped(module: Any) -> None:
    module.attention = _Twice(module.attention)


def _with_code_of_its_own(module: Any) -> None:
    given = module.attention.forward
    module.attention.forward = lambda *args, **options: (2 * given(*args, **options)[0], torch.zeros(1))


CHANGES = [
    *(_without_bias, _with_another_layer, _with_normed_weights, _as_a_replica),
    *(_with_dropout, _with_keys_of_its_own, _with_a_hook, _wrapped, _with_code_of_its_own),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_can_be_done_to_the_article_s_module_can_be_done_to_this(change: Any) -> None:
    torch.manual_seed(0)
    ours = ImageTextFusion(16, 4)
    theirs = Article(16, 4)
    theirs.load_state_dict(ours.state_dict())
    change(ours)
    change(theirs)
    image, text = _pair(3, 5, 16, 16)
    torch.manual_seed(2)
    expected = theirs(image, text)[0]
    torch.manual_seed(2)
    torch.testing.assert_close(ours(image, text), expected)


def test_a_layer_may_give_no_weights() -> None:
    class Alone(torch.nn.Linear):
        def forward(self, query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return super().forward(query)

    module: Any = ImageTextFusion(16, 4)
    module.attention = Alone(16, 16)
    assert module(*_pair(3, 5, 16, 16)).shape == (5, 16)


def test_layers_may_be_of_several_dtypes() -> None:
    module = ImageTextFusion(16, 4)
    image, text = _pair(3, 5, 16, 16)
    one = module(image, text)
    module.text_proj.double()
    torch.testing.assert_close(module(image, text), one)


def test_a_subclass_may_have_layers_of_its_own_and_hooks_are_heard() -> None:
    class Headed(ImageTextFusion):
        def __init__(self) -> None:
            super().__init__(16, 4)
            self.head = torch.nn.Linear(16, 3)

        def forward(self, image_feat: torch.Tensor, text_feat: torch.Tensor) -> torch.Tensor:
            fused: torch.Tensor = self.head(super().forward(image_feat, text_feat))
            return fused

    heard = []
    module = Headed()
    module.text_proj.register_forward_hook(lambda *_: heard.append(1))
    assert module(*_pair(3, 5, 16, 16)).shape == (5, 3)
    assert heard == [1]


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("learned", [True, False])
def test_it_is_exported_for_any_number_of_rows(learned: bool) -> None:
    module, rows = ImageTextFusion(32, 4).requires_grad_(learned), torch.export.Dim("rows", min=2, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(module, _pair(7, 5, 32, 32), dynamic_shapes=({0: rows}, {0: tokens})).module()
    image, text = _pair(11, 9, 32, 32)
    torch.testing.assert_close(exported(image, text), module(image, text))


def test_shapes_can_be_told_without_numbers() -> None:
    module = ImageTextFusion(32, 4).requires_grad_(False).to("meta")
    assert module(*(x.to("meta") for x in _pair(7, 5, 32, 32))).shape == (5, 32)


@pytest.mark.parametrize("seed", range(20))
def test_numbers_without_gradients_are_as_good_as_the_articles(seed: int) -> None:
    theirs = Article(384, 1)
    ours = ImageTextFusion(384, 1)
    ours.load_state_dict(theirs.state_dict())
    rng = np.random.default_rng(seed)
    image, text = (torch.from_numpy(features(rng, rows, 384, norm=90)) for rows in (7, 8))  # scores in the tens
    with torch.no_grad():
        fused, single = ours(image, text), theirs(image, text)[0]
        assert_as_good(fused, theirs.double()(image.double(), text.double())[0].numpy(), single.numpy())


def test_a_lazy_projection_takes_what_it_gets() -> None:
    module = ImageTextFusion(16, 4)
    module.text_proj = torch.nn.LazyLinear(16)
    assert module(*_pair(3, 5, 16, 24)).shape == (5, 16)
