// What fine-tuning needs in Azure: a file share with the workspace, an environment with the GPU, and the job.
//
// `python infra/azure.py provision finetuning` deploys it with the values of finetuning.parameters.json, which is where
// to change them. A resource whose name is given there must exist, and is used as it is. If the name is empty, the
// resource is created; its name is the same in every deployment, so deploying again updates it.
// inference.bicep creates or uses the same share and logs, with identical code, and its own environment: so each can
// have another GPU, and deploying one never affects the other.

// ---- Parameters

@description('The name of the workspace. Names and tags of the created resources are derived from it.')
param projectName string

@description('The Azure region. It must offer the GPU, and all named existing resources must be in it.')
param location string

@description('What the job runs in the workspace, in order; it stops at the first command that fails.')
@minLength(1)
param defaultCommands array

@description('The maximum seconds of a run; then it is stopped. A stopped run resumes from its last checkpoint.')
@minValue(60)
@maxValue(2592000)
param timeout int

@description('The hardware to rent, one of `sizes` below. Consumption has no GPU: enough for the demo model.')
param workloadProfileType string

@description('The name of that profile in the environment. Only needed for an existing environment.')
param workloadProfileName string = workloadProfileType == 'Consumption' ? 'Consumption' : 'gpu'

@description('The maximum instances of a dedicated profile (NC…-A100): each is billed while anything runs on it.')
@minValue(1)
param maximumInstanceCount int

// Existing resources in this resource group, which are used as they are.
@description('An existing storage account, for the file share. Empty: one is created.')
param storageAccountName string
@description('An existing file share in that account. Empty: one is created.')
param fileShareName string
@description('An existing Container Apps environment. Empty: one is created.')
param acaEnvironmentName string
@description('An existing storage of that environment, for writing to the share. Empty: one is created.')
param acaEnvironmentStorageName string
@description('An existing Log Analytics workspace, for the logs. Empty: one is created.')
param acaLogAnalyticsName string

@description('The name of the job, which is created or updated. Empty: one is derived from projectName.')
param acaJobName string

@description('An existing key vault of this resource group, with Azure RBAC and the secret hf-token. Empty: none.')
param keyVaultName string

@secure()
@description('A token of the Hugging Face hub, for gated models; not needed with a key vault. Empty: no token.')
param hfToken string = ''

@secure()
@description('Seals the Python environments on the share, the same for the job and the app. infra/azure.py draws it.')
param environmentKey string = newGuid()

@description('The SHA-256 of the code that runs; infra/azure.py sets it with each start. none: nothing was sent yet.')
param codeSha256 string = 'none'

// uv 0.9.30 on Python 3.12 and Debian 12, as tagged ghcr.io/astral-sh/uv:0.9.30-python3.12-bookworm-slim. A tag can be
// moved, a digest cannot; many public Dockerfiles name this one. For a newer one, put what this prints into both files:
//   docker buildx imagetools inspect ghcr.io/astral-sh/uv:VERSION-python3.12-bookworm-slim
@description('The container image, pinned by its digest. It must have bash, Python 3.11 to 3.13, and uv.')
param image string = 'ghcr.io/astral-sh/uv@sha256:e5b65587bce7de595f299855d7385fe7fca39b8a74baa261ba1b7147afa78e58'

// At 80 %, and when 100 % is forecast, the owners of the resource group get an email. Nothing is stopped.
@description('What you plan to spend on this resource group per month, in your currency. 0: no budget.')
@minValue(0)
param budgetAmount int

@description('Who gets the budget emails, in addition to the owners.')
param budgetContactEmails array

@description('The first month of the budget: Azure takes only the current one, and refuses to change it later.')
param budgetStart string = utcNow('yyyy-MM-01')

@description('Tags of all created resources, in addition to `workspace`, by which infra/azure.py finds them.')
param tags object

// ---- Derived values

// As large as the profile allows. A container on a serverless profile has one GPU, on a dedicated one all GPUs.
var sizes = {
  Consumption: { cpu: 4, memory: '8Gi' }
  'Consumption-GPU-NC8as-T4': { cpu: 8, memory: '56Gi' }
  'Consumption-GPU-NC24-A100': { cpu: 24, memory: '220Gi' }
  'NC24-A100': { cpu: 24, memory: '220Gi' }
  'NC48-A100': { cpu: 48, memory: '440Gi' }
  'NC96-A100': { cpu: 96, memory: '880Gi' }
}
var size = sizes[workloadProfileType]

var allTags = union(tags, { workspace: projectName })
// Without hyphens, since a name cannot have two in a row.
var uniqueName = '${take(replace(projectName, '-', ''), 12)}-${take(uniqueString(resourceGroup().id, projectName), 6)}'
var storageName = empty(storageAccountName) ? 'st${uniqueString(resourceGroup().id, projectName)}' : storageAccountName
var shareName = empty(fileShareName) ? uniqueName : fileShareName
var environmentName = empty(acaEnvironmentName) ? 'env-job-${uniqueName}' : acaEnvironmentName
var environmentStorageName = empty(acaEnvironmentStorageName) ? 'share-${uniqueName}' : acaEnvironmentStorageName
var logsName = empty(acaLogAnalyticsName) ? 'log-${uniqueName}' : acaLogAnalyticsName
var jobName = empty(acaJobName) ? 'job-${uniqueName}' : acaJobName

// Python environments contain links; without byte-range locks, since nothing else writes to locked files.
var mountOptions = 'mfsymlinks,nobrl'
var mountVariables = [
  { name: 'WORKSPACE_MOUNT', value: '/mount' }
  { name: 'HF_HOME', value: '/mount/.cache/huggingface' } // a model is downloaded once
  { name: 'PYTHONUNBUFFERED', value: '1' }
  { name: 'CODE_SHA256', value: codeSha256 }
  { name: 'ENVIRONMENT_KEY', secretRef: 'environment-key' }
]
var start = loadTextContent('../start.sh')
var environmentSecret = { name: 'environment-key', value: environmentKey }
// The same as in setup/no_telemetry.py, for commands that do not import it.
var noTelemetry = [
  { name: 'ORT_DISABLE_TELEMETRY', value: '1' }
  { name: 'OLIVE_DISABLE_TELEMETRY', value: '1' }
  { name: 'HF_HUB_DISABLE_TELEMETRY', value: '1' }
  { name: 'HF_UPDATE_DOWNLOAD_COUNTS', value: '0' }
  { name: 'GRADIO_ANALYTICS_ENABLED', value: 'False' }
  { name: 'DO_NOT_TRACK', value: '1' }
  { name: 'CI', value: '1' }
  { name: 'MLFLOW_DISABLE_TELEMETRY', value: 'true' }
  { name: 'WANDB_ERROR_REPORTING', value: 'false' }
]

var vaultSecrets = 'https://${keyVaultName}${environment().suffixes.keyvaultDns}/secrets'
var tokenSecret = empty(keyVaultName)
  ? { name: 'hf-token', value: hfToken }
  : { name: 'hf-token', keyVaultUrl: '${vaultSecrets}/hf-token', identity: identity.id }
var hasToken = !empty(hfToken) || !empty(keyVaultName)

// ---- The share with the workspace, the models and the Python environments

resource newStorage 'Microsoft.Storage/storageAccounts@2025-06-01' = if (empty(storageAccountName)) {
  name: storageName
  location: location
  tags: allTags
  sku: { name: 'Standard_LRS' } // only stored data is billed
  kind: 'StorageV2'
  properties: {
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    allowBlobPublicAccess: false
    allowCrossTenantReplication: false
    // Container Apps mount a share over SMB only with the account's key.
    allowSharedKeyAccess: true
    // Your machine sends the workspace here, and an environment without its own network has no fixed address:
    // there is no address range to restrict access to.
    publicNetworkAccess: 'Enabled'
  }
}

resource newFileService 'Microsoft.Storage/storageAccounts/fileServices@2025-06-01' = if (empty(storageAccountName)) {
  parent: newStorage
  name: 'default'
  properties: {
    protocolSettings: {
      smb: { versions: 'SMB3.1.1', channelEncryption: 'AES-128-GCM;AES-256-GCM', authenticationMethods: 'NTLMv2' }
    }
    shareDeleteRetentionPolicy: { enabled: true, days: 7 }
  }
}

resource storage 'Microsoft.Storage/storageAccounts@2025-06-01' existing = { name: storageName }

resource fileService 'Microsoft.Storage/storageAccounts/fileServices@2025-06-01' existing = {
  parent: storage
  name: 'default'
}

resource newShare 'Microsoft.Storage/storageAccounts/fileServices/shares@2025-06-01' = if (empty(fileShareName)) {
  parent: fileService
  name: shareName
  properties: {
    accessTier: 'TransactionOptimized' // a Python environment has many small files
    shareQuota: 1024 // GiB, the maximum
  }
  dependsOn: [newFileService]
}

// ---- The environment with the GPU, and its logs

resource newLogs 'Microsoft.OperationalInsights/workspaces@2025-07-01' = if (empty(acaLogAnalyticsName) && empty(acaEnvironmentName)) {
  name: logsName
  location: location
  tags: allTags
  properties: {
    sku: { name: 'PerGB2018' }
    retentionInDays: 30 // included in the price of the logs
    workspaceCapping: { dailyQuotaGb: 1 }
  }
}

resource log 'Microsoft.OperationalInsights/workspaces@2025-07-01' existing = { name: logsName }

var consumptionProfile = { name: 'Consumption', workloadProfileType: 'Consumption' }
// Azure refuses counts for a serverless profile; a dedicated one has no instance while it is idle.
var isServerless = startsWith(workloadProfileType, 'Consumption')
var counts = isServerless ? {} : { minimumCount: 0, maximumCount: maximumInstanceCount }
var gpuProfile = union({ name: workloadProfileName, workloadProfileType: workloadProfileType }, counts)

resource newEnvironment 'Microsoft.App/managedEnvironments@2025-07-01' = if (empty(acaEnvironmentName)) {
  name: environmentName
  location: location
  tags: allTags
  properties: {
    workloadProfiles: workloadProfileType == 'Consumption' ? [consumptionProfile] : [consumptionProfile, gpuProfile]
    appLogsConfiguration: {
      destination: 'log-analytics'
      logAnalyticsConfiguration: { customerId: log.properties.customerId, sharedKey: log.listKeys().primarySharedKey }
    }
  }
  dependsOn: [newLogs]
}

resource containerEnvironment 'Microsoft.App/managedEnvironments@2025-07-01' existing = { name: environmentName }

resource newEnvironmentStorage 'Microsoft.App/managedEnvironments/storages@2025-07-01' = if (empty(acaEnvironmentStorageName)) {
  parent: containerEnvironment
  name: environmentStorageName
  properties: {
    azureFile: {
      accountName: storageName
      accountKey: storage.listKeys().keys[0].value
      shareName: shareName
      accessMode: 'ReadWrite'
    }
  }
  dependsOn: [newEnvironment, newShare]
}

// ---- The identity of the containers, and its access: the secrets of the key vault, if there is one

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2024-11-30' = {
  name: 'id-${uniqueName}'
  location: location
  tags: allTags
}

resource vault 'Microsoft.KeyVault/vaults@2025-05-01' existing = { name: empty(keyVaultName) ? 'none' : keyVaultName }

var keyVaultSecretsUser = '4633458b-17de-408a-874b-0445c86b69e6' // the role, the same in every subscription
resource vaultAccess 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(keyVaultName)) {
  scope: vault
  name: guid(vault.id, identity.id)
  properties: {
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', keyVaultSecretsUser)
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
  }
}

// ---- The job

resource job 'Microsoft.App/jobs@2025-07-01' = {
  name: jobName
  location: location
  tags: allTags
  identity: { type: 'UserAssigned', userAssignedIdentities: { '${identity.id}': {} } }
  properties: {
    environmentId: containerEnvironment.id
    workloadProfileName: workloadProfileName
    configuration: {
      triggerType: 'Manual'
      manualTriggerConfig: { parallelism: 1, replicaCompletionCount: 1 }
      replicaTimeout: timeout
      replicaRetryLimit: 0 // a failed run would mostly fail again, and be billed again
      secrets: hasToken ? [environmentSecret, tokenSecret] : [environmentSecret]
      // Azure reads the key vault with it; the containers cannot use it.
      identitySettings: [{ identity: identity.id, lifecycle: 'None' }]
    }
    template: {
      containers: [
        {
          name: 'finetuning'
          image: image
          command: ['bash', '-euo', 'pipefail', '-c']
          args: ['${start}${join(defaultCommands, ' && ')}']
          env: concat(mountVariables, noTelemetry, hasToken ? [{ name: 'HF_TOKEN', secretRef: 'hf-token' }] : [])
          resources: { cpu: size.cpu, memory: size.memory }
          volumeMounts: [{ volumeName: 'workspace', mountPath: '/mount' }]
        }
      ]
      volumes: [
        { name: 'workspace', storageType: 'AzureFile', storageName: environmentStorageName, mountOptions: mountOptions }
      ]
    }
  }
  dependsOn: [newEnvironmentStorage, vaultAccess]
}

// ---- A budget for the resource group

var budgetMail = {
  enabled: true
  operator: 'GreaterThan'
  contactEmails: budgetContactEmails
  contactRoles: ['Owner']
}

resource budget 'Microsoft.Consumption/budgets@2024-08-01' = if (budgetAmount > 0) {
  name: '${uniqueName}-${budgetStart}'
  properties: {
    category: 'Cost'
    amount: budgetAmount
    timeGrain: 'Monthly'
    timePeriod: { startDate: budgetStart }
    notifications: {
      actual80: union(budgetMail, { threshold: 80, thresholdType: 'Actual' })
      forecast100: union(budgetMail, { threshold: 100, thresholdType: 'Forecasted' })
    }
  }
}

// ---- Outputs for infra/finetuning.config.json

output SUBSCRIPTION_ID string = subscription().subscriptionId
output RESOURCE_GROUP_NAME string = resourceGroup().name
output STORAGE_ACCOUNT_NAME string = storageName
output FILE_SHARE_NAME string = shareName
output ACA_JOB_NAME string = job.name
output COMMANDS array = defaultCommands
