"""`python -m fastgate.energy`: the same as `fastgate energy probe`, but works without torch."""

import json

from fastgate.energy.probe import probe

if __name__ == "__main__":
    print(json.dumps(probe(), indent=2))
