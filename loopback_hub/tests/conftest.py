from loopback_hub.plugin import hub_server  # noqa: F401  a fixture
