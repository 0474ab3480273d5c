"""`python -m anysite`, for torchrun and for machines whose PATH lacks the script."""

from anysite.cli import main

main()
