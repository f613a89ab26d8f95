"""What runs on an accelerator: a real one, or the pretended one of `scripts/test_devices.sh`."""
