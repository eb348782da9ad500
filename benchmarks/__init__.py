"""Programs that measure; each prints its own figures."""
