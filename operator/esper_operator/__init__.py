"""The operator: TrainingSessions, Blueprints and CompiledKernels in, pods and status out.

What there is (`views`, `observed`) goes through pure decisions (`decisions`) to what is to be
written (`plans`); only the machinery around them talks to the API server, the hub and the bus.
"""
