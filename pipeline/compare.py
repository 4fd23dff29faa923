"""The old spelling of `python -m pipeline compare`, kept until version 0.3."""

from pipeline.sharing.compare import main

if __name__ == "__main__":
    main()
