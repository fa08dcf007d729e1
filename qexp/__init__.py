"""qexp: what does quantizing this model cost, what does it buy, and why?"""

__version__ = "0.1.0"
