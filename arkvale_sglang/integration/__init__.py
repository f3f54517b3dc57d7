"""The only place that knows SGLang: flags, pools, backend and hooks.  Nothing is decided here."""
