"""`python -m fastgate.energy`: the same as `fastgate energy probe`, also where torch is not installed."""

import json

from fastgate.energy.probe import probe

if __name__ == "__main__":
    print(json.dumps(probe(), indent=2))
