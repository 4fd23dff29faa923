"""The old spelling of `python -m pipeline provenance`, kept until version 0.3."""

from pipeline.sharing.provenance import main

if __name__ == "__main__":
    main()
