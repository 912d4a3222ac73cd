"""The cards: read from the driver or declared, and what is known of their memory."""

from tidegate_lifecycle.devices.device import Device
from tidegate_lifecycle.devices.reader import Devices
from tidegate_lifecycle.devices.smi import HostSmi, Smi, Unreadable

__all__ = ["Device", "Devices", "HostSmi", "Smi", "Unreadable"]
