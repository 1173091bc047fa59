"""python -m filigrane."""

from filigrane.cli.main import main

main()
