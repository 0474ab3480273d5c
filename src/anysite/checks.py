"""Contract tests for plug-ins: call them from your own test suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from anysite.networks import Network

BuildNetwork = Callable[[int, int, Sequence[int]], Network]

PATCH_SIZES = {2: (64, 96), 3: (32, 32, 64)}


def check_network(build: BuildNetwork, dimension: int, *, patch_size: Sequence[int] | None = None) -> None:
    """Check that the networks made by `build(channels, classes, patch_size)` keep the contract.

    Args:
        build: Constructs a network; called several times, also for a copy that takes over the weights.
        dimension: The number of spatial axes, 2 or 3.
        patch_size: A shape that the network can take; none: one that suits most networks.

    Raises:
        AssertionError: the first part of the contract that is broken, with what was found.
    """
    patch_size = tuple(patch_size or PATCH_SIZES[dimension])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for channels, classes in ((1, 4), (3, 2)):
            network = build(channels, classes, patch_size)
            _check_shapes(network, torch.randn(1, channels, *patch_size), classes)
        image = torch.randn(2, channels, *patch_size)
        _check_gradients(network, image)
        network.eval()
        with torch.no_grad():
            logits = network(image)
            _check_repeatable(network, image, logits)
            _check_samples_apart(network, image, logits)
            _check_decode_needs_features_alone(network, image, logits)
            _check_saving(network, build(channels, classes, patch_size).eval(), image, logits)
            _check_bfloat16(network, image[:1])


def _check_shapes(network: Network, image: Tensor, classes: int) -> None:
    network.eval()
    with torch.no_grad():
        features = network.encode(image)
        logits = network(image)
    shape = (len(image), classes, *image.shape[2:])
    _require(tuple(logits.shape) == shape, f"logits of shape {tuple(logits.shape)}; expected {shape}")
    _require(bool(logits.isfinite().all()), "logits that are not finite")
    widths = tuple(feature.shape[1] for feature in features)
    _require(
        widths == tuple(network.widths), f"widths is {network.widths}; encode returned features of {widths}"
    )
    voxels = [feature[0, 0].numel() for feature in features]
    _require(voxels[-1] == min(voxels), f"features of {voxels} voxels; expected the smallest last")
    sizes = zip(image.shape[2:], network.stride, strict=True)
    bottleneck = tuple(size // step for size, step in sizes)
    found = tuple(features[-1].shape[2:])
    _require(
        found == bottleneck, f"a bottleneck of {found} voxels; stride {network.stride} says {bottleneck}"
    )


def _check_gradients(network: Network, image: Tensor) -> None:
    network.train()
    with torch.no_grad():
        for parameter in network.parameters():  # so that layers initialised with zeros pass gradients on
            parameter.add_(0.01 * torch.randn_like(parameter))
    for logits in network.decode_scales(network.encode(image)):
        (logits * torch.randn_like(logits)).sum().backward(retain_graph=True)
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    _require(not without, f"no gradient reaches {', '.join(without)}")
    network.zero_grad()


def _check_repeatable(network: Network, image: Tensor, logits: Tensor) -> None:
    network.train()
    network.eval()
    _require(torch.equal(network(image), logits), "eval mode: the same image gave two different logits")


def _check_samples_apart(network: Network, image: Tensor, logits: Tensor) -> None:
    apart = torch.cat([network(sample) for sample in image.split(1)])
    difference = float((logits - apart).abs().max())
    limit = 1e-4 * max(1.0, float(apart.abs().max()))
    _require(
        difference <= limit, f"eval mode: a batch of 2 differs from two batches of 1 by {difference:.2g}"
    )


def _check_decode_needs_features_alone(network: Network, image: Tensor, logits: Tensor) -> None:
    features = network.encode(image)
    copies = [feature.clone() for feature in features]
    network.encode(torch.zeros_like(image))  # overwrites what a network may have kept for decode
    _require(
        torch.equal(network.decode(features), logits), "decode(encode(image)) differs from forward(image)"
    )
    same = all(torch.equal(feature, copy) for feature, copy in zip(features, copies, strict=True))
    _require(same, "decode changed the features it was given")
    finest, *coarser = network.decode_scales(features)
    _require(torch.equal(finest, logits), "the first of decode_scales differs from decode")
    sizes = [tuple(scale.shape[2:]) for scale in coarser]
    known = {tuple(feature.shape[2:]) for feature in features}
    _require(
        all(scale.shape[1] == logits.shape[1] for scale in coarser) and set(sizes) <= known,
        f"decode_scales gives {sizes}, which are no scales of the features {sorted(known)}, or other classes",
    )


def _check_saving(network: Network, other: Network, image: Tensor, logits: Tensor) -> None:
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    try:
        saved = safetensors.torch.save(state)
    except RuntimeError as error:
        raise AssertionError(f"Network contract: no state for safetensors: {error}") from error
    other.load_state_dict(safetensors.torch.load(saved))  # safetensors, not a pickle
    _require(torch.equal(other(image), logits), "a loaded copy gives other logits than the original")


def _check_bfloat16(network: nn.Module, image: Tensor) -> None:
    layout = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(image.contiguous(memory_format=layout))
    _require(bool(logits.isfinite().all()), "logits under bf16 autocast that are not finite")


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise AssertionError(f"Network contract: {broken}")
