"""Device files: what a GPU and its links can do, each number with its source. `h100`, `h200` and `a100` ship."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from truedag.launch.errors import LaunchError
from truedag.tracer.estimate.device import Device

_SHIPPED = Path(__file__).parent / "devices"


class Quantity(BaseModel):
    """A number, and who says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0)
    """In units of the field that it stands in."""

    source: str = Field(min_length=3)
    """A document, a measurement, or that it is assumed; and what of that could not be verified."""


class DeviceFile(BaseModel):
    """The fields of `tracer.estimate.device.Device`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    peak_flops: dict[str, Quantity]
    product_fraction: Quantity
    memory_bytes: Quantity
    memory_bandwidth: Quantity
    memory_fraction: Quantity
    kernel_ns: Quantity
    inside_bandwidth: Quantity
    across_bandwidth: Quantity
    link_fraction: Quantity
    base_ns: Quantity
    inside_ns: Quantity
    overhead_ns: Quantity
    across_ns: Quantity
    exposed_ns: Quantity

    def device(self) -> Device:
        """Return the numbers alone."""
        fields = {
            name: getattr(self, name).value for name in type(self).model_fields if name not in ("name", "peak_flops")
        }
        peaks = {dtype: one.value for dtype, one in self.peak_flops.items()}
        return Device(name=self.name, peak_flops=peaks, **fields)


def device_names() -> list[str]:
    """Return the names of the devices that ship."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_device(name_or_path: str) -> DeviceFile:
    """Read a device file.

    Raises:
        LaunchError: it ships under no such name, cannot be read, or is wrong.
    """
    names = device_names()
    path = _SHIPPED / f"{name_or_path}.yaml" if name_or_path in names else Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"device {name_or_path!r} is none of {', '.join(names)}, and no file: {error}") from error
    try:
        return DeviceFile.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise LaunchError(f"{name_or_path} is no device file: {error}") from error
