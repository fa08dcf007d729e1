"""python -m qexp"""

from qexp.cli import main

main()
