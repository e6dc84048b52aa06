"""What every entry of ROUTERS keeps, inside its layer: what it declares, padding, extremes, gradients of the whole."""

import copy
import inspect

import pytest
import torch
from router_cases import call, fitting, layer_of, route
from torch.utils.checkpoint import checkpoint

from headgate.kernels.plan import plan
from headgate.kernels.routing import Routing
from headgate.moe import Capacity, Given, SteeredRouter
from headgate.moe.routers import ROUTERS

D, E, K = 120, 8, 2  # a multiple of all numbers of experts here, as slices of x ask for


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(params=ROUTERS)
def name(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _changed_by(layer, x, where):
    """Tokens [B, S] whose output follows a change of the tokens `where` [B, S]."""
    with torch.no_grad():
        before = call(layer, x)
        after = call(layer, torch.where(where[..., None], torch.randn_like(x) * 3, x))
    return (before - after).abs().amax(-1) > 1e-9


def _takes(name, option):
    return option in inspect.signature(ROUTERS[name]).parameters


class TestRouting:
    """What a router answers, alone."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 8, 2), (1, 1, 1), (33, 8, 3), (5, 6, 6)])
    def test_is_whole(self, name, tokens, experts, k, dtype):
        router = fitting(name)(D, experts, k, dtype=dtype)
        routing = route(router, torch.randn(tokens, D, dtype=dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert isinstance(routing, Routing)
        assert routing.num_experts == experts
        ids = routing.expert_ids
        tokens = experts if router.slots else tokens  # its rows: a slot for each expert
        assert (ids.shape, ids.dtype) == (routing.weights.shape, torch.int32)
        assert routing.weights.dtype == wide
        assert len(ids) == tokens
        assert ids.shape[1] == k or not router.fixed_k
        for t in (routing.scores, routing.logits):
            assert t is None or (len(t), t.dtype) == (tokens, wide)
        assert routing.scores is not None or not router.balances
        there = (ids >= 0) & (ids < experts)
        assert (routing.counts.shape, routing.counts.dtype) == ((experts,), torch.int32)
        assert torch.equal(routing.counts, torch.bincount(ids[there], minlength=experts).int())
        assert routing.weights[ids < 0].eq(0).all()
        for row in ids.tolist():
            real = [e for e in row if e >= 0]
            assert len(set(real)) == len(real)

    def test_scores_stay_fp32_under_autocast(self, name, assert_close):
        router, x = fitting(name)(D, 8, 2), torch.randn(5, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = route(router, x)
        assert_close(inside.weights, route(router, x).weights)

    def test_gradients_reach_gate_and_input(self, name):
        bias = {"gate_bias": True} if _takes(name, "gate_bias") else {}
        router, x = fitting(name)(D, 8, 2, **bias), torch.randn(9, D, requires_grad=True)
        if not router.trains_gate:
            return  # see test_trains_gate
        if router.slots:
            rows, _, back = router.mix(x, Given())
            (back(rows * torch.randn_like(rows)) * torch.randn_like(x)).sum().backward()
            assert all(t.grad.abs().sum() > 0 for t in (x, *router.parameters()))
            return
        first = route(router, x)
        total = (first.weights * torch.randn_like(first.weights)).sum()
        if router.carries_state:
            then = route(router, x, torch.randn_like(first.state)).weights
            total = total + (then * torch.randn_like(then)).sum()
        total.backward()
        for path, p in (("x", x), *router.named_parameters()):
            assert path.startswith("free.") or p.grad.abs().sum() > 0

    def test_jitter_only_while_training(self, name):
        if not _takes(name, "jitter"):
            pytest.skip("has no jitter")
        router, x = fitting(name)(D, 8, 2, jitter=0.5), torch.randn(5, D)
        seen = (lambda: router.mix(x, Given())[0]) if router.slots else (lambda: route(router, x).scores)
        assert not torch.equal(seen(), seen())
        router.eval()
        assert torch.equal(seen(), seen())

    def test_state_and_copies_round_trip(self, name):
        router, x = fitting(name)(D, 8, 2), torch.randn(9, D)
        route(router, x)
        other = fitting(name)(D, 8, 2)
        other.load_state_dict(router.state_dict())
        for twin in (other, copy.deepcopy(router)):
            assert torch.equal(route(twin, x).weights, route(router, x).weights)

    def test_built_on_meta_then_filled(self, name):
        router = fitting(name)(D, 8, 2, device="meta").to_empty(device="cpu")
        router.reset_parameters()
        assert route(router, torch.randn(3, D)).weights.isfinite().all()

    def test_a_cast_leaves_what_is_steered(self, name):
        router = fitting(name)(D, 8, 2)
        steered = getattr(router, "steered", ())
        before = {buffer: getattr(router, buffer).clone() for buffer in steered}
        router.to(torch.bfloat16)
        assert all(torch.equal(getattr(router, buffer), value) for buffer, value in before.items())
        assert all(p.dtype == torch.bfloat16 for p in router.parameters())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"top_k": 9}, r"top_k must be between 1 and the number of experts \(8\), got 9"),
            ({"jitter": 1.0}, r"jitter must be in \[0, 1\), got 1\.0"),
            ({"scale": -1.0}, r"scale must be positive and finite, got -1\.0"),
        ],
    )
    def test_bad_arguments_are_named(self, name, change, message):
        if not _takes(name, next(iter(change))):
            pytest.skip("has no such option")
        with pytest.raises(ValueError, match=f"{ROUTERS[name].__name__}: {message}"):
            fitting(name)(**{"hidden_size": D, "num_experts": 8, "top_k": 2} | change)

    def test_non_finite_scores_are_refused(self, name):
        router, x = fitting(name)(D, 8, 2), torch.randn(5, D)
        if router.trains_gate:
            x[2, 3] = float("nan")
            with pytest.raises(ValueError, match=r"scores.* must be finite, got nan for token 2"):
                route(router, x)


class TestDeclares:
    """Each fact is true, and the opposite fact is shown where it is declared."""

    def test_causal(self, name, x):
        layer = layer_of(name).eval()
        last = torch.zeros(3, 7, dtype=torch.bool)
        last[:, 3:] = True
        changed = _changed_by(layer, x, last)[:, :3].any().item()
        assert changed == (not layer.router.causal)

    def test_per_token(self, name, x):
        layer = layer_of(name).eval()
        others = torch.ones(3, 7, dtype=torch.bool)
        others[1, 4] = False
        assert _changed_by(layer, x, others)[1, 4].item() == (not layer.router.per_token)

    def test_fixed_k(self, name, x):
        layer, found = layer_of(name), []
        for training in (True, False):
            call(layer.train(training), x)
            ids = layer.last_routing.expert_ids
            found.append(((ids >= 0) & (ids < E)).sum(1).eq(K).all().item())
        assert all(found) == layer.router.fixed_k

    def test_needs_ids(self, name, x):
        layer = layer_of(name)
        ids = torch.zeros(3, 7, dtype=torch.long)
        if layer.router.needs_ids:
            with pytest.raises(ValueError, match=r"MoE: ids must be the token ids \[3, 7\] for a \w+, got None"):
                layer(x)
            assert layer(x, ids=ids) is not None
        else:
            with pytest.raises(ValueError, match=r"MoE: ids must be None for a \w+, which does not use it, got a"):
                layer(x, ids=ids)

    def test_carries_state(self, name, x):
        layer = layer_of(name)
        if not layer.router.carries_state:
            ids = {"ids": torch.zeros(3, 7, dtype=torch.long)} if layer.router.needs_ids else {}
            with pytest.raises(ValueError, match="MoE: state must be None for a "):
                layer(x, state=x, **ids)
            return
        first, state = layer(x)
        second, _ = layer(x, state=torch.randn_like(state))
        assert state.shape[:-1] == x.shape[:-1]
        assert not torch.equal(first, second)

    def test_trains_gate(self, name, x):
        layer = layer_of(name, load_balancing_coef=0.0)
        call(layer, x).square().sum().backward()
        got = any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.router.parameters())
        assert got == layer.router.trains_gate


class TestPadding:
    """A token that is padding has no expert, no count, no loss and no gradient; where it stands does not matter."""

    LENGTHS = (4, 7, 2)

    def _padded(self, x, left):
        mask = torch.zeros(3, 7, dtype=torch.bool)
        put = torch.full_like(x, 1e3)
        for row, n in enumerate(self.LENGTHS):
            where = slice(7 - n, 7) if left else slice(0, n)
            mask[row, where] = True
            put[row, where] = x[row, :n]
        return put.requires_grad_(), mask

    def test_left_and_right_are_one(self, name, x, assert_close):
        layer = layer_of(name, load_balancing_coef=float(ROUTERS[name].balances), z_loss_coef=0.1,
                         shared_intermediate_size=6)  # fmt: skip
        if layer.router.draws:
            layer.router.eval()
        found = []
        for left in (False, True):
            put, mask = self._padded(x, left)
            layer.zero_grad()
            y = call(layer, put, mask)
            y.square().sum().backward()
            assert y[~mask].eq(0).all()
            assert put.grad[~mask].eq(0).all()
            routing = layer.last_routing
            assert layer.router.slots or routing.expert_ids[~mask.flatten()].eq(-1).all()
            gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
            found.append((y[mask], put.grad[mask], routing.counts, dict(layer.aux_losses), gradients))
        (y, dx, counts, losses, gradients), (y2, dx2, counts2, losses2, gradients2) = found
        assert torch.equal(counts, counts2)
        for a, b in zip((y, dx, *losses.values(), *gradients), (y2, dx2, *losses2.values(), *gradients2), strict=True):
            assert_close(a, b)

    def test_without_padding_it_is_the_same(self, name, x, assert_close):
        """One sequence alone and with a padded tail: outputs, losses and what the router keeps count of."""
        kept = []
        for padded in (False, True):
            torch.manual_seed(3)
            layer = layer_of(name, z_loss_coef=0.1)
            row, mask = x[:1], None
            if padded:
                row = torch.cat([row, torch.full((1, 5, D), float("nan"), dtype=x.dtype)], 1)
                mask = torch.arange(12)[None] < 7
            y = call(layer, row, mask)[:, :7]
            load = getattr(layer.router, "load", None)
            kept.append((y, *layer.aux_losses.values(), *([] if load is None else [load.double()])))
        for a, b in zip(*kept, strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("options", [{"shared_intermediate_size": 6, "shared_gate": True}, {"latent_size": 4}])
    def test_what_stands_there_reaches_no_gradient(self, name, x, options):
        layer = layer_of(name, load_balancing_coef=float(ROUTERS[name].balances), z_loss_coef=0.1, **options)
        x[:, 4:] = float("nan")
        call(layer, x, torch.arange(7).expand(3, 7) < 4).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())

    def test_nothing_but_padding(self, name, x):
        layer = layer_of(name, z_loss_coef=0.1)
        y = call(layer, x, torch.zeros(3, 7, dtype=torch.bool))
        assert y.eq(0).all()
        y.sum().backward()
        assert all(loss.isfinite() for loss in layer.aux_losses.values())
        assert all(p.grad is None or p.grad.eq(0).all() for p in layer.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_rows_stay_finite(name, dtype, scale):
    layer = layer_of(name, dtype=dtype, z_loss_coef=1e-3, load_balancing_coef=float(ROUTERS[name].balances))
    layer.router.near = [0]  # of LocMoE: its second loss
    x = (torch.randn(9, D) * scale).to(dtype).requires_grad_()
    call(layer, x).float().square().mean().backward()
    for t in (x.grad, *layer.aux_losses.values(), *(p.grad for p in layer.router.parameters() if p.grad is not None)):
        assert t.isfinite().all()
    assert layer.last_routing.weights.isfinite().all()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 8, 2), (1, 8, 2), (5, 3, 3), (2, 40, 1)])
def test_odd_sizes(name, tokens, experts, k):
    layer = layer_of(name, experts=experts, k=k)
    y = call(layer, torch.randn(tokens, D, dtype=torch.float64))
    assert y.shape == (tokens, D)
    assert y.isfinite().all()
    (y.sum() * 0 + y.square().sum()).backward()


@pytest.mark.parametrize("name", ["softmax", "relu", "expert_choice", "top_p"])
def test_a_capacity_goes_by_k(name, x):
    """Where a routing has a place for every expert, too."""
    layer = layer_of(name, capacity=0.5)
    call(layer, x)
    assert layer.last_overflow.capacity == Capacity(0.5).of(21, K, E) >= layer.last_routing.counts.max()


@pytest.mark.parametrize("how", ["random", "round_robin"])
def test_a_forced_load_has_as_many_pairs(name, how, x):
    found = []
    for forced in (None, how):
        torch.manual_seed(3)
        layer = layer_of(name, force_load_balancing=forced).eval()
        call(layer, x)
        found.append(layer.last_routing)
    own, even = found
    assert even.counts.sum() == own.counts.sum() == plan(even.expert_ids, E).offsets[-1]
    assert how == "random" or even.counts.max() - even.counts.min() <= 1


def test_equals_it_took_the_lowest(name):
    """Among equals the lowest id comes first: every token of x = 0 is such a case."""
    layer = layer_of(name).eval()
    call(layer, torch.zeros(4, D, dtype=torch.float64))
    routing = layer.last_routing
    if routing.scores is not None and routing.scores.eq(routing.scores[0, 0]).all() and layer.router.per_token:
        assert routing.expert_ids.tolist() == [routing.expert_ids[0].tolist()] * 4
        assert routing.expert_ids[0].tolist() == sorted(routing.expert_ids[0].tolist())


def test_gradient_is_that_of_loss_and_losses(name, x):
    """Of plain loss + coefficient * auxiliary losses, against finite differences: in the router's parameters and x."""
    if ROUTERS[name].straight_through:
        pytest.skip("its gradient is declared to be another, see TestParts")
    coefs = {"load_balancing_coef": 0.7 * ROUTERS[name].balances, "z_loss_coef": 0.3}
    layer, x = layer_of(name, **coefs), x.clone().requires_grad_()
    aim = torch.randn(3, 7, D, dtype=torch.float64)

    def whole():
        torch.manual_seed(4)  # for a router that draws
        y = call(layer, x)
        losses = layer.aux_losses
        return ((y * aim).sum() + coefs["load_balancing_coef"] * losses.get("load_balancing", 0)
                + coefs["z_loss_coef"] * losses.get("z_loss", 0))  # fmt: skip

    torch.manual_seed(4)
    (call(layer, x) * aim).sum().backward()
    for p in (x, *layer.router.parameters()):
        flat, grad = p.data.view(-1), torch.zeros_like(p) if p.grad is None else p.grad
        scale = max(1.0, grad.abs().max().item())
        for at in torch.randperm(flat.numel())[:4].tolist():
            here, step = flat[at].item(), 1e-6
            flat[at] = here + step
            more = whole().item()
            flat[at] = here - step
            less = whole().item()
            flat[at] = here
            assert abs((more - less) / (2 * step) - grad.view(-1)[at].item()) < 1e-5 * scale


def test_recomputation_counts_once(name, x):
    """Under activation checkpointing: the same outputs, gradients and counts."""
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        layer = layer_of(name, z_loss_coef=0.1)
        y = checkpoint(call, layer, x, use_reentrant=False) if again else call(layer, x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters() if p.grad is not None),
                      *([] if getattr(layer.router, "load", None) is None else [layer.router.load])])  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["softmax", "moepp", *(slow(n) for n in ROUTERS if n not in ("softmax", "moepp"))])
def test_compiles_whole_with_padding(name, x, assert_close, own_compilations):
    layer = layer_of(name).eval()
    mask = torch.arange(7) < torch.tensor([4, 7, 2])[:, None]
    want = call(layer, x, mask)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(layer, x, mask)
    assert_close(got, want)


@pytest.mark.parametrize(("state", "got"), [([1.0], "list"), (torch.ones(3, 7, 8, dtype=torch.long), "torch.int64")])
def test_a_bad_state_is_named(state, got, x):
    with pytest.raises(TypeError, match=f"MoE: state must be a floating point tensor, got {got}"):
        layer_of("pregate")(x, state=state)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 7), TypeError, "mask must be bool, got torch.float32"),
        (torch.ones(7, dtype=torch.bool), ValueError, r"mask must be \[3, 7\] as x is but for D, got \[7\]"),
        ([True] * 7, TypeError, "mask must be a tensor, got list"),
    ],
)
def test_bad_masks_are_named(mask, error, message, x):
    with pytest.raises(error, match=f"MoE: {message}"):
        layer_of("softmax")(x, mask)


STEERED = [name for name, router in ROUTERS.items() if issubclass(router, SteeredRouter) and name != "expert_choice"]


@pytest.mark.parametrize("name", STEERED)  # of expert choice a call is the batch, and says so
def test_what_steers_knows_no_split(name):
    """A batch of 12 sequences, in micro-batches of equal and unequal size, run again in the backward pass: one step."""
    x, found = torch.randn(12, 7, D, generator=torch.Generator().manual_seed(5)), []
    mask = torch.arange(7) < torch.arange(12)[:, None] % 8
    for parts in ((12,), (4, 4, 4), (6, 2, 4)):
        for again in (False, True):
            torch.manual_seed(3)
            layer = layer_of(name, dtype=torch.float32)
            for one, there in zip(x.split(parts), mask.split(parts), strict=True):
                y = checkpoint(call, layer, one, there, use_reentrant=False) if again else call(layer, one, there)
                y.sum().backward()
            layer.router.update_bias()
            found.append([getattr(layer.router, buffer) for buffer in layer.router.steered])
    fresh = layer_of(name, dtype=torch.float32).router
    for buffers in found:
        for buffer, a, b in zip(fresh.steered, buffers, found[0], strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, getattr(fresh, buffer))


@pytest.mark.parametrize("parts", [(4, 4, 4), (6, 2, 4)])
@pytest.mark.parametrize("again", [False, True])
def test_losses_of_sequences_and_tokens_know_no_split(parts, again, assert_close):
    """Balancing each sequence, and the z-loss: with `aux_scale` the micro-batch's share of the step, the sum of values
    and gradients is the whole batch's, whatever the sizes of the micro-batches."""
    x, found = torch.randn(12, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), []
    for sizes in ((12,), parts):
        torch.manual_seed(3)
        layer = layer_of("softmax", load_balancing_coef=0.5, load_balancing_scope="sequence", z_loss_coef=0.1)
        values = torch.zeros(2, dtype=torch.float64)
        for one in x.split(sizes):
            layer.aux_scale = len(one) / len(x)
            y = checkpoint(call, layer, one, use_reentrant=False) if again else call(layer, one)
            (y.square().sum() / len(x)).backward()
            values += layer.aux_scale * torch.stack([*layer.aux_losses.values()])
        found.append((values, *(p.grad for p in layer.parameters())))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("bad", [float("nan"), -1, -0.5], ids=str)
def test_an_option_out_of_range_is_named(name, bad):
    """Every option that is a number, of every router; `seed` may be any."""
    options = inspect.signature(ROUTERS[name]).parameters
    numbers = [n for n, p in options.items() if type(p.default) in (int, float) and n not in ("seed",)]
    for option in ("hidden_size", "num_experts", "top_k", *numbers):
        sizes = {"hidden_size": D, "num_experts": E, "top_k": K} | {option: bad}
        named = "experts" if option == "num_experts" else option
        with pytest.raises((ValueError, TypeError), match=named):
            fitting(name)(**sizes)
