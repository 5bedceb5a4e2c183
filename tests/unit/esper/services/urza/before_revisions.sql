-- The tables of a SQLite file that Esper made before Urza's tables had revisions.
CREATE TABLE blueprints (
    digest VARCHAR(64) NOT NULL,
    document JSON NOT NULL,
    state VARCHAR(13) NOT NULL,
    id CHAR(32) NOT NULL,
    created_at DATETIME NOT NULL,
    updated_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (digest),
    CONSTRAINT blueprintstate CHECK (state IN ('proposed', 'compiling', 'validating', 'characterized', 'deployed', 'failed', 'archived'))
);
CREATE TABLE training_sessions (
    name VARCHAR(253) NOT NULL,
    outcome VARCHAR(11) NOT NULL,
    epoch INTEGER NOT NULL,
    epochs INTEGER NOT NULL,
    num_layers INTEGER NOT NULL,
    num_slots INTEGER NOT NULL,
    seeds JSON NOT NULL,
    id CHAR(32) NOT NULL,
    created_at DATETIME NOT NULL,
    updated_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (name),
    CONSTRAINT sessionoutcome CHECK (outcome IN ('Running', 'Succeeded', 'Failed', 'Interrupted'))
);
CREATE TABLE compiled_kernels (
    kernel VARCHAR(40) NOT NULL,
    blueprint_id CHAR(32) NOT NULL,
    target JSON NOT NULL,
    state VARCHAR(13) NOT NULL,
    claimed_by VARCHAR(253),
    artifact_digest VARCHAR(64),
    artifact_bytes INTEGER,
    figures JSON,
    error TEXT,
    id CHAR(32) NOT NULL,
    created_at DATETIME NOT NULL,
    updated_at DATETIME NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (kernel),
    FOREIGN KEY(blueprint_id) REFERENCES blueprints (id) ON DELETE CASCADE,
    CONSTRAINT blueprintstate CHECK (state IN ('proposed', 'compiling', 'validating', 'characterized', 'deployed', 'failed', 'archived'))
);
CREATE INDEX ix_compiled_kernels_blueprint_id ON compiled_kernels (blueprint_id);
CREATE INDEX ix_compiled_kernels_state ON compiled_kernels (state);
