import sys

from steer_adapter.cli import main


sys.exit(main())
