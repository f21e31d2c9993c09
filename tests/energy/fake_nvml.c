/* A stand-in for libnvidia-ml.so.1 with a virtual clock, for testing energy meters without a GPU.
 *
 * Only ABI facts (function names, structure layout, codes) come from the public NVML header.  The real
 * Python bindings (package nvidia-ml-py, module pynvml) run on top of it unmodified, so a test also sees
 * wrong structures, unchecked return codes and unit mistakes that mocking the Python module hides.
 * tests/energy/fake.py builds and loads it.
 *
 * Tests drive it through the fake_* functions.  Time stands still except in fake_advance_us().  A device
 * burns the watts it was last given; its energy counter and power readings change only on multiples of
 * its period, as on real boards.  In a process of its own, where nobody can call these functions,
 * FAKE_NVML_BOARDS adds boards and lets the time be real.
 *
 * -DOLD_DRIVER leaves out what drivers before Volta's lack: the energy counter and field values.
 */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
enum { FIELD_ENERGY = 83, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186, FIELD_ENERGY_2 = 191 };
enum { TYPE_UINT = 1, TYPE_ULONGLONG = 3, SCOPE_GPU = 0 };
enum { MAX_DEVICES = 8, MAX_INJECTIONS = 32, MAX_SLICES = 4, MAX_PROCESSES = 8 };

typedef struct device {
    char uuid[96], name[96], bus[32];
    unsigned architecture;
    double watts;           /* now */
    double true_mj;         /* what was used */
    double energy_mj;       /* the same, unless a test has set the counter */
    double latched_mj;      /* what the counter shows */
    double latched_watts;   /* what the power readings show */
    double limit_watts;
    uint64_t period_us;
    int stalled;            /* the counter is not renewed */
    unsigned long long energy_glitch;
    unsigned power_glitch;
    int energy_glitches, power_glitches; /* how many readings answer these in place of the truth */
    int has_counter, has_instant, has_average;
    int error;              /* what every call on this board answers */
    int hidden;             /* what looking it up answers */
    unsigned long long throttle;
    unsigned pids[MAX_PROCESSES], process_count;
    struct device *parent;  /* of a MIG slice */
    struct device *slices[MAX_SLICES];
    unsigned slice_count;
} device_t;
typedef device_t *nvmlDevice_t;

typedef union {
    double d;
    unsigned ui;
    unsigned long ul;
    unsigned long long ull;
    long long sll;
    int si;
} value_t;

typedef struct {
    unsigned field, scope;
    long long timestamp, latency_us;
    int type, status;
    value_t value;
} field_t;

typedef struct {
    char bus_legacy[16];
    unsigned domain, bus, device, pci_device, pci_subsystem;
    char bus_id[32];
} pci_t;

typedef struct {
    unsigned pid;
    unsigned long long memory;
    unsigned gpu_instance, compute_instance;
} process_t;

static device_t devices[MAX_DEVICES], slices[MAX_DEVICES * MAX_SLICES];
static struct { char function[64]; int code; } injections[MAX_INJECTIONS];
static unsigned device_count, slice_count, injection_count, references;
static unsigned long calls, initialised;
static int real_time;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t now_us, slowness_us;

static int injected(const char *function) {
    for (unsigned i = 0; i < injection_count; i++)
        if (!strcmp(injections[i].function, function)) return injections[i].code;
    return OK;
}

static void follow_real_time(void);

#define ENTER(condition)                              \
    do {                                              \
        int code_ = injected(__func__);               \
        calls++;                                      \
        follow_real_time();                           \
        if (!references) return UNINITIALIZED;        \
        if (code_ != OK) return code_;                \
        if (!(condition)) return INVALID_ARGUMENT;    \
    } while (0)

#define ENTER_DEVICE(condition)                       \
    do {                                              \
        ENTER(device && (condition));                 \
        if (device->error) return device->error;      \
    } while (0)

/* ---- control surface for tests ------------------------------------------------------------ */

void fake_reset(void) {
    memset(devices, 0, sizeof devices);
    memset(slices, 0, sizeof slices);
    device_count = slice_count = injection_count = references = 0;
    calls = initialised = 0;
    real_time = 0;
    now_us = slowness_us = 0;
}

/* Returns the index of the new device, or -1 when there is no room or the period is 0. */
int fake_add_device(const char *uuid, const char *name, const char *bus, unsigned architecture,
                    double watts, uint64_t period_us, int has_counter, int has_instant) {
    if (device_count == MAX_DEVICES || !period_us) return -1;
    device_t *d = &devices[device_count];
    snprintf(d->uuid, sizeof d->uuid, "%s", uuid);
    snprintf(d->name, sizeof d->name, "%s", name);
    snprintf(d->bus, sizeof d->bus, "%s", bus);
    d->architecture = architecture;
    d->watts = d->latched_watts = watts;
    d->limit_watts = 70;
    d->period_us = period_us;
    d->has_counter = has_counter;
    d->has_instant = has_instant;
    return (int)device_count++;
}

void fake_set_watts(unsigned index, double watts) {
    if (index < device_count) devices[index].watts = watts;
}

/* Sets the counter, for example to 0 for a driver reload in the middle of a window. */
void fake_set_counter_mj(unsigned index, double mj) {
    if (index < device_count) devices[index].energy_mj = devices[index].latched_mj = mj;
}

void fake_set_limit_watts(unsigned index, double watts) { devices[index].limit_watts = watts; }
void fake_set_stalled(unsigned index, int stalled) { devices[index].stalled = stalled; }

/* What the next reading of the counter (mJ) or of the power (mW) answers, in place of the truth. */
void fake_glitch_energy(unsigned index, unsigned long long mj) {
    devices[index].energy_glitch = mj;
    devices[index].energy_glitches = 1;
}

void fake_glitch_power(unsigned index, unsigned mw) {
    devices[index].power_glitch = mw;
    devices[index].power_glitches = 1;
}

/* Every reading of energy or power takes so long; it answers what is true at its end. */
void fake_set_slowness_us(uint64_t us) { slowness_us = us; }

/* Makes one NVML function return an error code until fake_clear_errors(); -1 when there is no room. */
int fake_inject_error(const char *function, int code) {
    if (injection_count == MAX_INJECTIONS) return -1;
    snprintf(injections[injection_count].function, sizeof injections[0].function, "%s", function);
    injections[injection_count++].code = code;
    return 0;
}

void fake_clear_errors(void) { injection_count = 0; }

/* One board's calls fail, or looking it up does (a board outside the container); 0 for neither. */
void fake_set_error(unsigned index, int code) { devices[index].error = code; }
void fake_hide(unsigned index, int code) { devices[index].hidden = code; }
void fake_set_average(unsigned index, int has) { devices[index].has_average = has; }
void fake_set_throttle(unsigned index, unsigned long long bits) { devices[index].throttle = bits; }

void fake_add_process(unsigned index, unsigned pid) {
    devices[index].pids[devices[index].process_count++] = pid;
}

/* The board becomes one in MIG mode. */
void fake_add_slice(unsigned index, const char *uuid) {
    device_t *slice = &slices[slice_count++];
    snprintf(slice->uuid, sizeof slice->uuid, "%s", uuid);
    slice->parent = &devices[index];
    devices[index].slices[devices[index].slice_count++] = slice;
}

unsigned fake_references(void) { return references; }
unsigned long fake_initialised(void) { return initialised; }
unsigned long fake_calls(void) { return calls; }
double fake_exact_mj(unsigned index) { return devices[index].energy_mj; }
double fake_true_mj(unsigned index) { return devices[index].true_mj; }

void fake_advance_us(uint64_t us) {
    pthread_mutex_lock(&mutex);
    uint64_t end = now_us + us;
    for (unsigned i = 0; i < device_count; i++) {
        device_t *d = &devices[i];
        for (uint64_t t = now_us; t < end;) {
            uint64_t tick = (t / d->period_us + 1) * d->period_us;
            uint64_t next = tick < end ? tick : end;
            d->energy_mj += d->watts * (double)(next - t) * 1e-3; /* W x us = 1e-3 mJ */
            d->true_mj += d->watts * (double)(next - t) * 1e-3;
            t = next;
            if (t % d->period_us == 0) {
                if (!d->stalled) d->latched_mj = d->energy_mj;
                d->latched_watts = d->watts;
            }
        }
    }
    now_us = end;
    pthread_mutex_unlock(&mutex);
}

uint64_t fake_now_us(void) { return now_us; }

static uint64_t monotonic_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void follow_real_time(void) {
    static uint64_t start;
    if (!real_time) return;
    if (!start) start = monotonic_us() - now_us;
    fake_advance_us(monotonic_us() - start - now_us);
}

/* "uuid,name,bus,watts,period_us,has_counter,has_instant;..." */
__attribute__((constructor)) static void add_boards_of_environment(void) {
    const char *boards = getenv("FAKE_NVML_BOARDS");
    char copy_[1024], *rest;
    if (!boards) return;
    real_time = 1;
    snprintf(copy_, sizeof copy_, "%s", boards);
    for (char *board = strtok_r(copy_, ";", &rest); board; board = strtok_r(NULL, ";", &rest)) {
        char uuid[96], name[96], bus[32];
        double watts;
        unsigned long period;
        int counter, instant;
        if (sscanf(board, "%95[^,],%95[^,],%31[^,],%lf,%lu,%d,%d", uuid, name, bus, &watts, &period, &counter,
                   &instant) != 7)
            abort();
        fake_add_device(uuid, name, bus, 6, watts, period, counter, instant);
    }
}

/* ---- the NVML functions an energy meter calls --------------------------------------------- */

#ifndef OLD_DRIVER
static unsigned long long read_energy(device_t *device) {
    if (device->energy_glitches && device->energy_glitches--) return device->energy_glitch;
    if (slowness_us) fake_advance_us(slowness_us);
    return (unsigned long long)(device->latched_mj + 1e-6);
}
#endif

static unsigned read_power(device_t *device) {
    if (device->power_glitches && device->power_glitches--) return device->power_glitch;
    if (slowness_us) fake_advance_us(slowness_us);
    return (unsigned)(device->latched_watts * 1000);
}

static int copy(const char *text, char *buffer, unsigned size) {
    if (strlen(text) >= size) return TOO_SMALL;
    strcpy(buffer, text);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = injected(__func__);
    if (code == OK) references++, initialised++;
    return code;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    if (!references) return UNINITIALIZED;
    references--;
    return OK;
}

const char *nvmlErrorString(int code) {
    return code == OK ? "Success" : code == NOT_SUPPORTED ? "Not Supported" : "Error";
}

int nvmlSystemGetDriverVersion(char *buffer, unsigned size) {
    ENTER(buffer);
    return copy("0.0-fake", buffer, size);
}

int nvmlSystemGetNVMLVersion(char *buffer, unsigned size) {
    ENTER(buffer);
    return copy("0.0-fake", buffer, size);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(count);
    *count = device_count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    ENTER(device && index < device_count);
    if (devices[index].hidden) return devices[index].hidden;
    *device = &devices[index];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    ENTER(uuid && device);
    for (unsigned i = 0; i < device_count; i++)
        if (!strcmp(uuid, devices[i].uuid)) return *device = &devices[i], devices[i].hidden;
    for (unsigned i = 0; i < slice_count; i++)
        if (!strcmp(uuid, slices[i].uuid)) return *device = &slices[i], OK;
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvmlDevice_t *device) {
    ENTER(bus && device);
    for (unsigned i = 0; i < device_count; i++)
        if (!strcasecmp(bus, devices[i].bus)) return *device = &devices[i], OK;
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    ENTER_DEVICE(index);
    *index = (unsigned)(device - devices);
    return OK;
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char *buffer, unsigned size) {
    ENTER_DEVICE(buffer);
    return copy(device->uuid, buffer, size);
}

int nvmlDeviceGetName(nvmlDevice_t device, char *buffer, unsigned size) {
    ENTER_DEVICE(buffer);
    return copy(device->name, buffer, size);
}

int nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture) {
    ENTER_DEVICE(architecture);
    *architecture = device->architecture;
    return OK;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *energy) {
    ENTER_DEVICE(energy);
    if (!device->has_counter) return NOT_SUPPORTED;
    *energy = read_energy(device);
    return OK;
}
#endif

int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    ENTER_DEVICE(milliwatts);
    *milliwatts = read_power(device);
    return OK;
}

#ifndef OLD_DRIVER
/* As in NVML, the call succeeds and every element carries its own status. */
int nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, field_t *fields) {
    ENTER_DEVICE(fields && count >= 0);
    for (int i = 0; i < count; i++) {
        field_t *f = &fields[i];
        f->timestamp = (long long)now_us;
        f->latency_us = 0;
        f->status = NOT_SUPPORTED;
        if (f->field == FIELD_POWER_INSTANT && f->scope == SCOPE_GPU && device->has_instant) {
            f->status = OK;
            f->type = TYPE_UINT;
            f->value.ui = read_power(device);
        } else if ((f->field == FIELD_ENERGY || f->field == FIELD_ENERGY_2) && device->has_counter) {
            f->status = OK;
            f->type = TYPE_ULONGLONG;
            f->value.ull = read_energy(device);
        } else if (f->field == FIELD_POWER_AVERAGE && f->scope == SCOPE_GPU && device->has_average) {
            f->status = OK; /* unsupported on Turing and older */
            f->type = TYPE_UINT;
            f->value.ui = read_power(device);
        }
    }
    return OK;
}
#endif

int nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, pci_t *info) {
    ENTER_DEVICE(info);
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "%s", device->bus);
    return OK;
}

int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts) {
    ENTER_DEVICE(milliwatts);
    *milliwatts = (unsigned)(device->limit_watts * 1000);
    return OK;
}

int nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned *least, unsigned *most) {
    ENTER_DEVICE(least && most);
    *least = 0;
    *most = (unsigned)(device->limit_watts * 1000);
    return OK;
}

int nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius) {
    ENTER_DEVICE(celsius && sensor == 0);
    *celsius = 40;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    ENTER_DEVICE(reasons);
    *reasons = device->throttle;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, process_t *processes) {
    ENTER_DEVICE(count);
    unsigned room = *count;
    *count = device->process_count;
    if (room < device->process_count) return TOO_SMALL;
    for (unsigned i = 0; i < device->process_count; i++) processes[i] = (process_t){.pid = device->pids[i]};
    return OK;
}

int nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    ENTER_DEVICE(current && pending);
    *current = *pending = device->slice_count > 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count) {
    ENTER_DEVICE(count);
    *count = MAX_SLICES; /* as in NVML, slots may be empty */
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *slice) {
    ENTER_DEVICE(slice);
    if (index >= device->slice_count) return NOT_FOUND;
    *slice = device->slices[index];
    return OK;
}
