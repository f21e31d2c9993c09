"""Callbacks for other trainers: `fastgate.integrations.lightning` and `fastgate.integrations.transformers`."""
