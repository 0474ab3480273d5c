import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks import nets
from torch import nn

from anysite import registry
from anysite.checks import check_network
from anysite.errors import AnysiteError, ConfigError
from anysite.networks import Network
from anysite.networks.unet import InstanceNorm, UNet, plan_levels

# Patch sizes as small as each network allows, with unequal axes so that a swap of axes is noticed.
SMALL = {
    "unet": {2: (16, 32), 3: (8, 16, 32)},
    "ram_dsir_unet": {2: (16, 32)},
    "dynunet": {2: (16, 32), 3: (8, 16, 32)},
    "segresnet": {2: (16, 32), 3: (8, 16, 32)},
    "mednext": {2: (32, 48), 3: (16, 16, 32)},
    "unetr": {2: (16, 32), 3: (16, 16, 32)},
    "swin_unetr": {2: (32, 64), 3: (32, 32, 64)},
}
SETTINGS = {
    "unet": {"width": 4},
    "ram_dsir_unet": {"width": 4},
    "dynunet": {"width": 4},
    "segresnet": {"width": 8},
    "mednext": {"width": 4},
    "unetr": {"width": 4, "hidden_size": 24, "mlp_size": 32, "heads": 3},
    "swin_unetr": {"width": 12, "window_size": 2, "blocks_per_stage": 2},
}
EXISTING = [(name, dimension) for name in SMALL for dimension in SMALL[name]]


def build(name, dimension, channels=1, classes=2, **settings):
    patch_size = SMALL[name][dimension]
    return registry.build("network", name, channels, classes, patch_size, **SETTINGS[name] | settings)


def test_every_registered_network_is_tested():
    assert set(SMALL) == set(registry.NETWORKS)


@pytest.mark.parametrize(("name", "dimension"), EXISTING)
def test_contract(name, dimension):
    def construct(channels, classes, patch_size):
        return registry.build("network", name, channels, classes, patch_size, **SETTINGS[name])

    check_network(construct, dimension, patch_size=SMALL[name][dimension])


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": True},
        {"norm": "batch", "dropout": 0.2, "residual": True, "blocks_per_level": 3},
        {"norm": "group", "max_width": 6, "depth": 2},
        {"depth": 1},
        {"deep_supervision": True},
        {"deep_supervision": True, "depth": 1},
    ],
)
def test_contract_of_unet_settings(settings):
    check_network(lambda c, k, p: UNet(c, k, p, width=4, **settings), 2, patch_size=(16, 32))


@pytest.mark.parametrize("name", ["unet", "dynunet"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_deep_supervision_adds_coarser_scales_and_nothing_to_prediction(name, dimension):
    network = build(name, dimension, deep_supervision=True).eval()
    image = torch.randn(1, 1, *SMALL[name][dimension])
    features = network.encode(image)
    scales = network.decode_scales(features)
    # One for every level between the finest and the bottleneck.
    assert [s.shape[2:] for s in scales] == [f.shape[2:] for f in features[:-1]]
    heads = [p for n, p in network.named_parameters() if n.startswith("deep_heads")]
    gradients = torch.autograd.grad(
        network.decode(features).sum(), heads, allow_unused=True, retain_graph=True
    )
    assert all(gradient is None for gradient in gradients)
    gradients = torch.autograd.grad(torch.stack([s.sum() for s in scales]).sum(), heads)
    assert len(gradients) >= 2
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet", "mednext", "swin_unetr", "ram_dsir_unet"])
def test_takes_other_multiples_of_the_stride(name):
    network = build(name, 2)
    shape = [3 * step for step in network.stride]
    assert network(torch.randn(1, 1, *shape)).shape == (1, 2, *shape)


def test_ram_dsir_unet_has_the_published_parameter_counts():
    network = registry.build("network", "ram_dsir_unet", 3, 2, (64, 64))

    def count(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert count(network.encoder) == 1_967_904
    assert count(network.decoder) == 1_217_362
    assert count(network) == 1_967_904 + 1_217_362


MONAI = {
    "dynunet": lambda d: nets.DynUNet(
        d,
        1,
        2,
        kernel_size=[3, 3, 3, 3] if d == 2 else [(1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
        strides=[1, 2, 2, (1, 2)] if d == 2 else [1, (1, 2, 2), 2, (1, 1, 2)],
        upsample_kernel_size=[2, 2, (1, 2)] if d == 2 else [(1, 2, 2), 2, (1, 1, 2)],
        filters=[4, 8, 16, 32],
    ),
    "segresnet": lambda d: nets.SegResNet(d, 8, 1, 2),
    "mednext": lambda d: nets.MedNeXt(d, 4, 1, 2, kernel_size=3, use_residual_connection=True),
    "unetr": lambda d: nets.UNETR(1, 2, SMALL["unetr"][d], 4, 24, 32, 3, spatial_dims=d),
    "swin_unetr": lambda d: nets.SwinUNETR(1, 2, window_size=2, feature_size=12, spatial_dims=d),
}


@pytest.mark.parametrize(("name", "dimension"), [(name, d) for name in MONAI for d in (2, 3)])
def test_equals_monai_with_the_same_weights(name, dimension):
    ours, monai = build(name, dimension).eval(), MONAI[name](dimension).eval()
    missing, unexpected = monai.load_state_dict(ours.network.state_dict(), strict=False)
    assert not unexpected
    # DynUNet's second registration of the same layers, and UNETR's unused layers.
    assert all("skip_layers" in key or "norm_cross_attn" in key for key in missing)
    image = torch.randn(2, 1, *SMALL[name][dimension])
    with torch.no_grad():
        torch.testing.assert_close(ours(image), monai(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dimension", [2, 3])
def test_unet_equals_monai_dynunet_with_the_same_weights(dimension):
    patch_size = (16, 16, 32)[:dimension]  # MONAI's decoder takes the kernels of the next deeper level
    ours = registry.build("network", "unet", 1, 2, patch_size, width=4)
    twin = registry.build("network", "dynunet", 1, 2, patch_size, width=4)
    convolution, upwards = (nn.Conv2d, nn.Conv3d), (nn.ConvTranspose2d, nn.ConvTranspose3d)
    norms = (InstanceNorm, nn.InstanceNorm2d, nn.InstanceNorm3d)
    for kind in (convolution, upwards, norms):
        pairs = zip(*([m for m in n.modules() if isinstance(m, kind)] for n in (ours, twin)), strict=True)
        for mine, theirs in pairs:
            theirs.load_state_dict(mine.state_dict())
    image = torch.randn(2, 1, *patch_size)
    torch.testing.assert_close(ours(image), twin(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (2, 5, 4, 6, 8)])
def test_instance_norm_equals_its_definition_and_keeps_channels_last(shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    image = torch.randn(shape).contiguous(memory_format=layout)
    norm = InstanceNorm(shape[1])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    axes = tuple(range(2, len(shape)))
    centred = image - image.mean(axes, keepdim=True)
    whitened = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
    per_channel = (1, -1) + (1,) * len(axes)
    expected = whitened * norm.weight.view(per_channel) + norm.bias.view(per_channel)
    found = norm(image)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=layout)


LEVELS = {
    (64, 64): [(2, 2)] * 4,
    (256, 256): [(2, 2)] * 5,
    (128, 128, 128): [(2, 2, 2)] * 5,
    (12, 128, 128): [(1, 2, 2)] * 3 + [(2, 2, 2), (1, 2, 2)],
    (20, 320, 256): [(1, 2, 2)] * 3 + [(2, 2, 2)] * 2,
    (32, 32, 64): [(2, 2, 2)] * 3 + [(1, 1, 2)],
    (50, 64): [(2, 2), (1, 2), (1, 2)],  # 25 is odd; 8 is less than half of it
    (4, 4): [],
}


@pytest.mark.parametrize("patch_size", LEVELS)
def test_strides_follow_the_patch_size(patch_size):
    first, *strides = [stride for stride, _ in plan_levels(patch_size)]
    assert first == (1,) * len(patch_size)
    assert strides == LEVELS[patch_size]


def test_kernels_are_flat_across_coarse_axes():
    kernels = [kernel for _, kernel in plan_levels((12, 128, 128))]
    assert kernels == [(1, 3, 3)] * 3 + [(3, 3, 3)] * 3


@given(st.lists(st.integers(1, 400), min_size=2, max_size=3))
def test_levels_always_divide_the_patch_and_skip_no_voxel(patch_size):
    levels = plan_levels(patch_size)
    assert 1 <= len(levels) <= 6
    for axis, size in enumerate(patch_size):
        total = math.prod(stride[axis] for stride, _ in levels)
        assert size % total == 0
        assert total == 1 or size // total >= 4
    assert all(k >= step for stride, kernel in levels for k, step in zip(kernel, stride, strict=True))


@pytest.mark.parametrize(
    ("name", "patch_size", "settings", "text"),
    [
        ("ram_dsir_unet", (16, 16, 16), {}, "ram_dsir_unet: 3 spatial axes; expected 2. Set plan.dim"),
        ("segresnet", (64, 60), {}, "plan.patch_size: 60 voxels on axis 1; expected a multiple of 8. "
         r"Set plan.patch_size=\[64, 64\]"),
        ("mednext", (8, 32, 32), {}, r"8 voxels on axis 0; .* of 16. Set plan.patch_size=\[16, 32, 32\]"),
        ("unetr", (24, 24), {}, r"24 voxels on axis 0; .* of 16. Set plan.patch_size=\[32, 32\]"),
        ("swin_unetr", (32, 32), {}, r"one voxel; expected at least two. Set plan.patch_size=\[32, 64\]"),
        ("dynunet", (8, 10), {}, r"2 levels for patches of \[8, 10\]; .* Set plan.patch_size=\[16, 16\]"),
        ("unet", (32,), {}, r"plan.patch_size: \[32\]; expected 2 or 3 numbers"),
        ("unet", (32, 32), {"depth": 5}, r"network.depth: 5 levels for .*; expected 1 to 4. Leave"),
        ("unet", (32, 32), {"depth": 0}, "network.depth: 0 levels"),
        ("unet", (32, 32), {"norm": "layer"}, "network.norm: 'layer'; expected one of instance"),
        ("unet", (32, 32), {"width": 0}, "network.width: 0; expected a whole number of at least 1"),
        ("unet", (32, 32), {"dropout": 1.0}, "network.dropout: 1.0; expected a number from 0 to below 1"),
        ("segresnet", (32, 32), {"width": 12}, "network.width: 12; expected a multiple of 8"),
        ("mednext", (32, 32), {"kernel_size": 4}, "network.kernel_size: 4; expected an odd number"),
        ("unetr", (32, 32), {"heads": 5}, "network.hidden_size: 192; expected a multiple of network.heads=5"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(name, patch_size, settings, text):
    with pytest.raises(ConfigError, match=text):
        registry.build("network", name, 1, 2, patch_size, **settings)


def test_unetr_refuses_images_of_another_shape():
    with pytest.raises(AnysiteError, match="an image of"):
        build("unetr", 2)(torch.randn(1, 1, 32, 16))


class Plugin(Network):
    """A two-level network that keeps the contract but for one fault."""

    def __init__(self, channels, classes, patch_size, fault=""):
        super().__init__(channels, classes, patch_size)
        self.fault = fault
        self.widths = {"widths": (4, 7), "order": (8, 4)}.get(fault, (4, 8))
        self.stride = (4, 2) if fault == "stride" else (2, 2)
        self.body, self.down = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 8, 2, 2)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, classes, 1)
        if fault == "unused":
            self.unused = nn.Linear(1, 1)
        if fault == "tied":
            self.again = self.head
        if fault == "unsaved":
            self.register_buffer("scale", torch.rand(()), persistent=False)

    def encode(self, image):
        self.kept = skip = self.body(image)
        features = [skip, self.down(skip)]
        return features[::-1] if self.fault == "order" else features

    def decode(self, features):
        skip, image = features[::-1] if self.fault == "order" else features
        if self.fault == "mutates" and not torch.is_grad_enabled():
            skip.relu_()
        logits = self.head(self.up(image) + (self.kept if self.fault == "keeps" else skip))
        match self.fault:
            case "shape":
                return logits[:, 1:]
            case "infinite":
                return logits / 0
            case "bfloat16" if torch.is_autocast_enabled("cpu"):
                return logits / 0
            case "random":
                return logits * torch.rand(())
            case "batch":
                return logits - logits.mean(0)
            case "unsaved":
                return logits * self.scale
        return logits


FAULTS = {
    "widths": r"widths is \(4, 7\); encode returned features of \(4, 8\)",
    "stride": r"a bottleneck of \(4, 6\) voxels; stride \(4, 2\) says \(2, 6\)",
    "order": "expected the smallest last",
    "shape": r"logits of shape \(1, 3, 8, 12\); expected \(1, 4, 8, 12\)",
    "infinite": "logits that are not finite",
    "unused": "no gradient reaches unused.weight, unused.bias",
    "random": "the same image gave two different logits",
    "batch": "a batch of 2 differs",
    "keeps": "differs from forward",
    "mutates": "decode changed the features",
    "tied": "no state for safetensors",
    "unsaved": "a loaded copy gives other logits",
    "bfloat16": "under bf16 autocast",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_contract_finds_a_broken_plugin(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_network(lambda c, k, p: Plugin(c, k, p, fault), 2, patch_size=(8, 12))


def test_contract_accepts_a_sound_plugin_and_leaves_the_random_state():
    before = torch.get_rng_state()
    check_network(Plugin, 2)
    assert torch.equal(torch.get_rng_state(), before)
