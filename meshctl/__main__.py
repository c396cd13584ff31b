"""`python -m meshctl` is `meshctl`."""

from meshctl.cli import main

main()
