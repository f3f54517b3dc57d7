"""Speed and capacity beside stock SGLang: ``make bench``."""
